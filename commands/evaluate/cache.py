"""`secondcast evaluate score --cache`: evaluate a student on held-out trajectories of a cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.commands.shell.console import PlainTable, print_error, print_line, print_lines, print_table
from secondcast.commands.shell.outputs import OutputFile
from secondcast.commands.shell.resolve import quiet_device, resolve_teacher, terminal
from secondcast.evaluation.settings.cache_scoring import CacheScoring
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.evaluation.on_cache import CacheEvaluator
    from secondcast.evaluation.results import Evaluation
    from secondcast.storage_schemas.formats.files import Verify
    from secondcast.storage_schemas.reader import Cache

Pocket = Annotated[bool, typer.Option("--pocket", help="Score students exactly on the pocket world.")]
NumPrompts = Annotated[int, typer.Option(min=1, help="Number of held-out captions for --pocket.")]
NumTrajectories = Annotated[
    int, typer.Option(min=1, help="Number of held-out trajectories of --cache, spread over sources and guidance.")
]
CACHE_FLAGS = (
    "backbone", "num_trajectories", "timesteps", "closed_loop", "random_baseline", "batch_size", "backbone_dtype",
    "quantize", "modulation", "gpu_blocks", "attention_backend", "verify_checksums", "out_file",
)  # fmt: skip
POCKET_FLAGS = ("num_prompts", "steps", "guidance", "sample_grid")
_NAMES = {"out_file": "out"}
# The exit code of `secondcast` on Ctrl-C.
_INTERRUPTED = 130


def check_flags(given: Sequence[str], *, cache: bool, pocket: bool, closed_loop: int, random_baseline: bool) -> None:
    """Raise SettingsError for a flag that has no effect with the others, or without --cache and --pocket."""
    if not cache and not pocket:
        raise SettingsError(
            "evaluate score needs --cache (held-out trajectories of a cache) or --pocket (captions of the pocket "
            "world, scored exactly)"
        )
    refuse_idle(given, CACHE_FLAGS, "--cache", there=cache)
    refuse_idle(given, POCKET_FLAGS, "--pocket", there=pocket)
    if random_baseline and not closed_loop:
        raise SettingsError(
            "--random-baseline is given with --closed-loop 0, but the baseline is only sampled in the closed loop: "
            "remove one of the two"
        )
    refuse_idle(given, ("seed",), "--pocket or --random-baseline", there=pocket or random_baseline)


def refuse_idle(given: Sequence[str], flags: Sequence[str], needed: str, *, there: bool) -> None:
    """Raise SettingsError for one of the flags that have no effect without `needed`, unless that is given."""
    if not there and (idle := [name for name in flags if name in given]):
        name = _NAMES.get(idle[0], idle[0]).replace("_", "-")
        raise SettingsError(f"--{name} has no effect without {needed}: remove it, or give both")


@contextmanager
def told_when_interrupted(what_is_left: Callable[[], str]) -> Iterator[None]:
    """Report on Ctrl-C and SIGTERM what this command keeps, instead of the general message."""
    try:
        yield
    except KeyboardInterrupt:
        print_error(f"interrupted: {what_is_left()}")
        raise SystemExit(_INTERRUPTED) from None


def check_students(students: Sequence[Path]) -> None:
    """Raise StudentError for a folder that holds no student."""
    from secondcast.models.student.folder import student_folder

    for student in students:
        student_folder(student)


def check_one_form(groups: "Mapping[str, Sequence[Path]]") -> None:
    """Raise SettingsError unless the runs of one name have weights of one form: they are seeds of one student."""
    from secondcast.models.student.folder import config_of, student_folder

    for name, places in groups.items():
        forms = {config_of(student_folder(place)).get("quantization", "floating-point") for place in places}
        if len(forms) > 1:
            raise SettingsError(
                f"the runs named {name!r} have {' and '.join(sorted(forms))} weights: runs of one name are seeds of "
                f"one student; give another name to each form"
            )


def checked_cache(
    students: Sequence[Path], location: str, settings: "CacheScoring", verify_checksums: "Verify"
) -> "Cache":
    """The cache, after all checks that need only files: importing torch takes seconds."""
    from secondcast.storage_schemas.reader import Cache

    check_students(students)
    cache = Cache.open(location, verify=verify_checksums)
    cache.require_trajectories("evaluate")
    settings.check_on(cache)
    return cache


def open_bench(
    cache: "Cache", settings: "CacheScoring", backbone: str | None, device: str, quiet: bool
) -> "CacheEvaluator":
    """The evaluator of a cache, with the recorded backbone or another location of it."""
    torch_device = quiet_device(device)
    from secondcast.evaluation.on_cache import CacheEvaluator
    from secondcast.models.teacher.folder import DECODE_PARTS, REPLAY_PARTS

    parts = (*REPLAY_PARTS, *DECODE_PARTS) if settings.closed_loop else REPLAY_PARTS
    teacher = resolve_teacher(backbone or cache.manifest.source, parts)
    return CacheEvaluator.open(cache, teacher, settings, device=torch_device, progress=terminal(quiet))


def score_on_cache(
    student: Path,
    location: str,
    settings: CacheScoring,
    *,
    backbone: str | None,
    verify_checksums: "Verify",
    out_file: Path | None,
    overwrite: bool,
    device: str,
    quiet: bool,
    opened: "Callable[[Evaluation], None]",
) -> "Evaluation":
    """Evaluate on a cache, and write the record to out_file if one is given.

    An earlier record of this student on this cache is replaced.
    After the open loop, the partial record is written and passed to `opened`.
    """
    record = None
    if out_file is not None:
        record = OutputFile.open(
            out_file, overwrite=overwrite, own=lambda found: _is_record_of(found, student, location)
        )  # fmt: skip
    cache = checked_cache([student], location, settings, verify_checksums)
    kept: list[Evaluation] = []

    def keep(evaluation: "Evaluation") -> None:
        if record is not None:
            record.write(evaluation.encode())
        opened(evaluation)
        kept.append(evaluation)

    with told_when_interrupted(lambda: _what_is_left(out_file, opened=bool(kept))):
        found = open_bench(cache, settings, backbone, device, quiet).evaluate(student, opened=keep)
        if record is not None:
            record.write(found.encode())
    return found


def _is_record_of(data: bytes, student: Path, location: str) -> bool:
    """Whether a file is the record of this student, as it is now, on this cache."""
    from pydantic import ValidationError

    from secondcast.evaluation.results import Evaluation
    from secondcast.evaluation.text_encoder import student_digest
    from secondcast.models.student.folder import student_folder
    from secondcast.storage_schemas.io.folders import open_folder
    from secondcast.storage_schemas.reader import read_manifest

    try:
        found = Evaluation.model_validate_json(data)
    except ValidationError:
        return False
    same_student = found.student_digest == student_digest(student_folder(student))
    return same_student and found.sampling_digest == read_manifest(open_folder(location)).digests()["sampling"]


def _what_is_left(out_file: Path | None, *, opened: bool) -> str:
    if out_file is None:
        return "nothing is kept, and the same command starts over; give --out FILE.json to keep the errors by step"
    if not opened:
        return f"nothing is written to {out_file} yet, and the same command starts over"
    return f"{out_file} has the errors by step but no closed loop; the same command starts over"


def print_open_loop(facts: dict[str, Any]) -> None:
    """Print the open-loop part of secondcast.evaluation.tables.aggregates.summary."""
    opened = facts["open_loop"]
    print_line(
        f"{facts['student']} on {facts['trajectories']} of {facts['held_out']} held-out trajectories of "
        f"{facts['cache']}; errors are relative to the norm of the velocity",
    )
    _print_means("step, sigma", [{"name": f"{row['step']:>4}  {row['sigma']:.3f}", **row} for row in opened["by_step"]])
    _print_means("source", [{"name": row["source"], **row} for row in opened["by_source"]])
    if opened["by_guidance"][0]["guidance"] is not None:
        _print_means("guidance", [{"name": f"{row['guidance']:g}", **row} for row in opened["by_guidance"]])
    _print_means("overall", [{"name": "all", **opened["overall"]}])
    print_line(f"the {counted(len(opened['hardest_prompts']), 'prompt')} with the largest errors:")
    print_lines(f"  {_percent(row['error_fraction']):>9}  {row['prompt']}" for row in opened["hardest_prompts"])


def print_closed_loop(facts: dict[str, Any]) -> None:
    """Print the closed-loop part of the summary."""
    for row in facts["closed_loop"]:
        print_line(_closed_line(row))


def _print_means(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = PlainTable(title, "records", "student", "replay error", "ratio", "mean square")
    for row in rows:
        ratio = row["error_per_replay_error_ratio"]
        table.add_row(
            row["name"], str(row["records"]), _percent(row["error_fraction"]), _percent(row["replay_error_fraction"]),
            "" if ratio is None else f"{ratio:.3g}", f"{row['error_mean_square']:.3g}",
        )  # fmt: skip
    print_table(table)


def _closed_line(row: dict[str, Any]) -> str:
    psnr = "all pictures identical" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.2f} dB"
    if row["psnr_db"] is not None and row["identical_images"]:
        psnr += f" (without {row['identical_images']} identical)"
    lpips = "" if row["lpips"] is None else f", LPIPS {row['lpips']:.4f}"
    return (
        f"closed loop, {counted(row['trajectories'], 'trajectory')} sampled with {row['text_encoder']}: error of the "
        f"final "
        f"latent {_percent(row['latent_fraction'])}, {psnr}, SSIM {row['ssim']:.4f}{lpips}"
    )


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"
