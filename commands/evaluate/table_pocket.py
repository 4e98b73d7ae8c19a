"""`secondcast evaluate table --pocket`: exact scores of text encoders on the pocket world."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.commands.evaluate.reuse import Reused
from secondcast.commands.shell.outputs import OutputFolder
from secondcast.commands.shell.resolve import POCKET, quiet_device, resolve_teacher, terminal
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from secondcast.evaluation.tables.scored_rows import ScoredRun
    from secondcast.evaluation.tables.table import Table

SCORE_FILES = ("table.md", "table.json", "scaling.png", "embeddings.png")


def pocket_table(
    groups: Mapping[str, Sequence[Path]],
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    quantized_baseline: bool,
    folder: Path | None,
    device: str,
    quiet: bool,
) -> "Table":
    """Score teacher and students on the same held-out captions and noise."""
    torch_device = quiet_device(device)
    import torch

    from secondcast.evaluation.sampling import Generator
    from secondcast.evaluation.tables.scored_rows import computed_by, kept
    from secondcast.evaluation.tables.table import Table, row_of
    from secondcast.models.teacher.folder import BUILD_PARTS
    from secondcast.pocket.world import captions
    from secondcast.storage_schemas.io.digests import digest

    teacher, progress = resolve_teacher(POCKET, BUILD_PARTS), terminal(quiet)
    generator = Generator.open(
        teacher, resolution=None, steps=steps, guidance=guidance, seed=seed, dtype=torch.float32, device=torch_device
    )
    texts = captions(count, seed=seed, split="heldout")
    weights = [*(teacher.weight_hashes(part) for part in ("transformer", "vae")), teacher.config("scheduler")]
    asked = {"teacher": digest(weights), "count": str(count), "steps": str(steps), "guidance": repr(guidance)}
    asked |= {"seed": str(seed), **computed_by(device)}
    kept_in, reused, rows = None if folder is None else folder / "scored", Reused(), []
    for name, encoders in _encoders(groups, teacher, torch_device, quantized_baseline, progress.say):
        runs = []
        for number, encoder in enumerate(encoders, start=1):
            title, own = f"{name} {number}" if len(encoders) > 1 else name, asked | {"encoder": encoder.digest}
            before = kept(kept_in, own)
            reused.note(title, reused=before is not None)
            runs.append(before or _scored(generator, encoder, texts, title, own, kept_in, progress))
        check_one_size(name, [run.parameters for run in runs])
        scores = [run.by_dimension() for run in runs]
        rows.append(row_of(name, runs[0].parameters, scores, weight_bytes=encoders[0].weight_bytes))
    reused.say(progress, kept_in)
    return Table(captions=count, steps=steps, guidance=guidance, seed=seed, rows=tuple(rows))


def check_one_size(name: str, parameters: Sequence[int]) -> None:
    """Raise SettingsError unless the runs of one name have the same size."""
    if len(set(parameters)) > 1:
        raise SettingsError(
            f"the runs named {name!r} have {' and '.join(map(str, sorted(set(parameters))))} parameters: runs of one "
            f"name are seeds of one student; give another name to each size"
        )


def _encoders(
    groups: Mapping[str, Sequence[Path]], teacher: Any, device: Any, quantized_baseline: bool, say: Any
) -> Iterator[tuple[str, list[Any]]]:
    """Names of rows and their text encoders, loaded lazily."""
    import torch

    from secondcast.evaluation.settings.generating import TEACHER
    from secondcast.evaluation.tables.encoder_rows import EIGHT_BITS, student_row, teacher_row

    yield TEACHER, [teacher_row(teacher, dtype=torch.float32, device=device)]
    if quantized_baseline:
        try:
            yield EIGHT_BITS, [teacher_row(teacher, quantize="int8", dtype=torch.float32, device=device)]
        except MissingExtraError as error:
            say(f"skipping the row {EIGHT_BITS!r}: {error}")
    for name, places in groups.items():
        yield name, [student_row(name, place, teacher, device=device) for place in places]


def _scored(
    generator: Any, encoder: Any, texts: list[str], name: str, asked: dict[str, str], folder: Path | None, progress: Any
) -> "ScoredRun":
    from secondcast.evaluation.pocket_scores import score_images
    from secondcast.evaluation.tables.scored_rows import ScoredRun, keep

    with progress.bar(name, total=len(texts), done=0, unit="images") as bar:
        images_NHWC = generator.images(encoder.embed, texts, batch_size=64, bar=bar)
    run = ScoredRun.of(asked, encoder.parameters, score_images(images_NHWC, texts))
    keep(folder, run)
    return run


def write_results(table: "Table", groups: Mapping[str, Sequence[Path]], folder: OutputFolder, device: str) -> None:
    """Write SCORE_FILES."""
    from secondcast.evaluation.settings.generating import TEACHER
    from secondcast.evaluation.tables.encoder_rows import EIGHT_BITS
    from secondcast.evaluation.tables.plots import plot_embeddings, plot_scaling
    from secondcast.evaluation.tables.table import markdown

    folder.write("table.md", markdown(table).encode())
    folder.write("table.json", (table.model_dump_json(indent=1) + "\n").encode())
    folder.write("scaling.png", plot_scaling(table.rows, baselines=(TEACHER, EIGHT_BITS)))
    folder.write("embeddings.png", plot_embeddings(_embeddings(groups, table, device)))


def _embeddings(groups: Mapping[str, Sequence[Path]], table: "Table", device: str) -> dict[str, Any]:
    torch_device = quiet_device(device)
    import torch

    from secondcast.evaluation.settings.generating import TEACHER
    from secondcast.evaluation.tables.encoder_rows import student_row, teacher_row
    from secondcast.models.teacher.folder import BUILD_PARTS
    from secondcast.pocket.world import captions

    teacher = resolve_teacher(POCKET, BUILD_PARTS)
    texts = captions(min(table.captions, 192), seed=table.seed, split="heldout")
    encoders = {TEACHER: teacher_row(teacher, dtype=torch.float32, device=torch_device)}
    encoders |= {name: student_row(name, places[0], teacher, device=torch_device) for name, places in groups.items()}
    return {name: encoder.embeddings(texts, torch_device) for name, encoder in encoders.items()}
