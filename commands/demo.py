"""`secondcast demo`: the whole road on the pocket teacher, by the same code as the commands it names."""

import time
from pathlib import Path
from typing import Annotated

import typer

from secondcast.commands.build.build import build
from secondcast.commands.evaluate.evaluate import compare_picture, print_scores, score_pocket
from secondcast.commands.export import export
from secondcast.commands.inspect.pictures import write_film_strips
from secondcast.commands.inspect.report import write_report
from secondcast.commands.prompts import caption_lines, pocket_captions
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import OutputFolder, json_bytes, picture_bytes
from secondcast.commands.shell.resolve import POCKET, Device, Quiet
from secondcast.commands.train.train import train_run

FILES = ("prompts.txt", "film-strips.png", "side-by-side.png", "scores.json", "report.html")


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything goes.")] = Path("demo"),
    count: Annotated[int, typer.Option(min=64, help="Prompts to record.")] = 1024,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps with the embedding loss.")] = 2500,
    steps: Annotated[int, typer.Option(min=1, help="Steps with the vision loss after them.")] = 300,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Record the pocket teacher, train a student from the recording, score and show both.

    Example: secondcast demo
    """
    began = time.monotonic()
    asked = {"count": count, "warmup_steps": warmup_steps, "steps": steps}
    results = OutputFolder.open(folder, "demo", FILES, settings=asked, alone=True)
    cache, run, student = folder / "cache", folder / "run", folder / "student"
    _title(1, "captions of the pocket world")
    results.write("prompts.txt", caption_lines(pocket_captions(count)).encode())
    _title(2, "record the teacher: text encoder, then transformer")
    # fp32: without bf16 units it is the faster of the two, and the replay below is then the recording's own.
    build(
        str(cache),
        teacher=POCKET,
        prompts=[str(folder / "prompts.txt")],
        dtype="float32",
        batch_size=64,
        device=device,
        quiet=quiet,
    )
    from secondcast.storage_schemas.reader import Cache

    write_film_strips(
        Cache.open(cache), [0, 1, 2, 3], 8, None, device, results.file("film-strips.png"), quiet=quiet
    )  # fmt: skip
    _title(3, "train a student from the recording; the teacher's text encoder is not loaded")
    from secondcast.trainer.settings import TrainFlags

    flags = TrainFlags.from_flags(
        student="pocket-small",
        warmup_steps=warmup_steps,
        # Over so many steps it leads to better scores here than the context loss (docs/benchmarks.md).
        warmup_loss="embedding",
        steps=steps,
        batch_size=64,
        learning_rate=2e-4,
        warmup_learning_rate=3e-3,
        decay="cosine",
        dropout=0.0,
        position_bias_factor=20.0,
        checkpoint_every=500,
    )
    train_run(run, flags.settings(), {"cache": str(cache)}, device=device, quiet=quiet)
    if not student.exists():
        export(run, student, quiet=quiet)
    _title(4, "score teacher, student and an untrained student on compositions nobody trained on")
    scores, captions = score_pocket(student, 192, 20, 3.5, 0, device, quiet)
    side_by_side = results.file("side-by-side.png")
    side_by_side.write(picture_bytes(compare_picture(scores, captions), side_by_side.path))
    from secondcast.evaluation.pocket_scores import table_rows

    results.write("scores.json", json_bytes(table_rows(scores)))
    print_scores(scores, False)
    _title(5, "the recording and the student as one page")
    # Five steps of twenty: with all, decoding takes as long as the recording did.
    shown = {"students": (run,), "strips": None, "frames": 5, "closed_loop": 8, "batch_size": 20}
    write_report(str(cache), results.file("report.html"), shown, device=device, quiet=quiet)
    _where(folder, time.monotonic() - began)


def _title(number: int, text: str) -> None:
    print_line(f"\n[{number}/5] {text}", style="bold")


def _where(folder: Path, seconds: float) -> None:
    print_line(f"\nDone in {seconds:.0f} s. Look at")
    for name, what in (
        ("report.html", "every trajectory with its film strip, and the student's errors; open it in a browser"),
        ("side-by-side.png", "teacher, student and untrained student on the same captions and noise"),
        ("film-strips.png", "four recorded trajectories, decoded step by step"),
        ("scores.json", "the table above"),
        ("cache", "the recording"),
        ("run", "the training run: config, metrics, checkpoints"),
        ("student", "the student as FluxPipeline takes it"),
    ):
        print_line(f"  {folder / name!s:<28} {what}")
    print_line("and try")
    for command in (
        f"secondcast inspect summary {folder / 'cache'}",
        f"secondcast inspect show {folder / 'cache'} --grep red",
        f"secondcast inspect images {folder / 'cache'} 5 6 7 --out strips.png",
        f"secondcast evaluate score {folder / 'student'} --pocket --count 500",
    ):
        print_line(f"  .venv/bin/{command}")
