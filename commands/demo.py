"""`secondcast demo`: the whole pipeline on the pocket teacher, with the code of the commands that it names."""

import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.workers.launcher import BuildLauncher
from secondcast.commands.build.build import build
from secondcast.commands.evaluate.evaluate import (
    SHOWN,
    compare_picture,
    pocket_generator,
    print_scores,
    score_pocket,
)
from secondcast.commands.export import export
from secondcast.commands.init_student import init_student
from secondcast.commands.inspect.pictures import write_film_strips
from secondcast.commands.inspect.report import write_report
from secondcast.commands.prompts import caption_lines, pocket_captions
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import OutputFolder, json_bytes, picture_bytes
from secondcast.commands.shell.program import program
from secondcast.commands.shell.resolve import POCKET, Device, Quiet
from secondcast.commands.train.train import train_run
from secondcast.evaluation.settings.pocket import CAPTIONS, PocketSampling
from secondcast.inspection.report.settings import ReportSettings
from secondcast.models.student.initial.settings import InitialOptions
from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.progress import counted, duration_text
from secondcast.trainer.settings import TrainFlags, TrainSettings

_PARTS = 6
_FLAGS = ("--num-prompts", "--pretrain-steps", "--steps", "--device", "--quiet")

_MINUTES = 3
"""Duration with the default options on two idle cores, calculated from CPU seconds: docs/pocket.md."""

FILES = ("prompts.txt", "teacher.png", "film-strips.png", "side-by-side.png", "scores.json", "report.html")


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for all files.")] = Path("demo"),
    num_prompts: Annotated[int, typer.Option(min=64, help="Number of prompts to record.")] = 1024,
    pretrain_steps: Annotated[int, typer.Option(min=0, help="Number of pretraining steps (context loss).")] = 590,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps with the vision loss after pretraining.")] = 40,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Record the pocket teacher, train a student that starts from its text encoder, and compare both.

    Example: secondcast demo
    """
    parts, sampling = _Parts(quiet=quiet), PocketSampling()
    asked = {"count": num_prompts, "pretrain_steps": pretrain_steps, "steps": steps}
    results = OutputFolder.open(folder, "demo", FILES, settings=asked, alone=True)
    cache, initial, run, student = folder / "cache", folder / "initial", folder / "run", folder / "student"
    if not quiet:
        print_line(
            f"Records {counted(num_prompts, 'image')} of the pocket teacher, a miniature FLUX, trains a text encoder "
            f"of a ninth of the size on them, and compares both (about {_MINUTES} minutes on two idle cores with the "
            f"default options)."
        )
    with parts.part("captions of the pocket world, and the teacher's images of some", "prompts pocket"):
        results.write("prompts.txt", caption_lines(pocket_captions(num_prompts)).encode())
        first = results.file("teacher.png")
        first.write(picture_bytes(_teacher_picture(sampling, device), first.path))
        print_line(f"{first.path}: {counted(SHOWN, 'image')} of the teacher, to look at meanwhile")
    with parts.part("record the teacher: text encoder, then transformer", "build"):
        # fp32 is faster than bf16 on CPUs without bf16 units, and the replay below is then exact.
        build(
            str(cache),
            teacher=POCKET,
            asked=BuildSettings.from_flags(prompts=(folder / "prompts.txt",), dtype="float32", batch_size=64),
            launcher=BuildLauncher(),
            device=device,
            quiet=quiet,
        )
        from secondcast.storage_schemas.reader import Cache

        write_film_strips(
            Cache.open(cache), [0, 1, 2, 3], 8, None, device, results.file("film-strips.png"), quiet=quiet
        )  # fmt: skip
    with parts.part("make an initial student from the teacher's text encoder", "init-student"):
        asked_initial = InitialOptions(size="pocket-small", kind="cut", dtype="float32", batch_size=64)
        init_student(initial, POCKET, [str(folder / "prompts.txt")], asked_initial, device=device, quiet=quiet)
    with parts.part("train it on the recording; the teacher's text encoder is not loaded", "train"):
        train_run(run, _training(initial, pretrain_steps, steps), {"cache": str(cache)}, device=device, quiet=quiet)
        if not student.exists():
            export(run, student, quiet=quiet)
    with parts.part("score teacher, student and an untrained student on held-out compositions", "evaluate score"):
        scores, captions = score_pocket(student, CAPTIONS, sampling.steps, sampling.guidance, 0, device, quiet)
        side_by_side = results.file("side-by-side.png")
        side_by_side.write(picture_bytes(compare_picture(scores, captions), side_by_side.path))
        from secondcast.evaluation.pocket_scores import table_rows

        results.write("scores.json", json_bytes(table_rows(scores)))
        print_scores(scores, False)
    with parts.part("report on the recording and the student", "inspect report"):
        shown = ReportSettings(students=(run,), closed_loop=8, random_baseline=True)
        write_report(str(cache), results.file("report.html"), shown, device=device, quiet=quiet, notes=False)
    _where(folder, parts.seconds)


def _teacher_picture(sampling: PocketSampling, device: str) -> Any:
    """Images of the teacher with the captions and noise that the comparison shows first."""
    generator, captions = pocket_generator(SHOWN, sampling.steps, sampling.guidance, 0, device)
    import torch

    from secondcast.evaluation.pictures.picture import side_by_side
    from secondcast.models.teacher.text_encoder import TeacherTextEncoder
    from secondcast.storage_schemas.progress import Silent

    encoder = TeacherTextEncoder.load(generator.teacher, dtype=torch.float32, device=generator.backbone.device)
    images_NHWC = generator.images(encoder.encode, captions, batch_size=SHOWN, bar=Silent())
    return side_by_side(["teacher"], [images_NHWC], captions)


def _training(initial: Path, pretrain_steps: int, steps: int) -> TrainSettings:
    return TrainFlags.from_flags(
        student=str(initial),
        pretrain_steps=pretrain_steps,
        pretrain_loss="context",
        steps=steps,
        batch_size=64,
        learning_rate=2e-4,
        pretrain_lr=3e-3,
        lr_schedule="cosine",
        dropout=0.0,
        position_bias_lr_scale=20.0,
        checkpoint_every=500,
    ).settings()


@dataclass(kw_only=True)
class _Parts:
    """The parts of the demo, numbered and timed.

    seconds: time of each part in this call, by the command that it runs.
    """

    quiet: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, title: str, command: str) -> Iterator[None]:
        """A part; an error that names flags of the underlying command also names that command."""
        if not self.quiet:
            print_line("")
            print_line(f"[{len(self.seconds) + 1}/{_PARTS}] {title}", style="bold")
        began = time.monotonic()
        try:
            yield
        except SecondcastError as error:
            named = dict.fromkeys(re.findall(r"--[a-z][a-z-]*", str(error)))
            if others := [flag for flag in named if flag not in _FLAGS]:
                raise type(error)(
                    f"{error} (this part of the demo runs `secondcast {command}`, which has {' and '.join(others)})"
                ) from error
            raise
        self.seconds[command] = time.monotonic() - began


def _where(folder: Path, seconds: Mapping[str, float]) -> None:
    print_line("")
    listed = ", ".join(f"{command} {duration_text(one)}" for command, one in seconds.items())
    print_line(f"Done in {duration_text(sum(seconds.values()))} ({listed}). Results:")
    for name, description in (
        ("report.html", "teacher, student and untrained student side by side, all trajectories, the student's errors"),
        ("side-by-side.png", "teacher, student and untrained student on the same captions and noise"),
        ("teacher.png", "images of the teacher, written first"),
        ("film-strips.png", "four recorded trajectories, decoded step by step"),
        ("scores.json", "the table above"),
        ("cache", "the recording"),
        ("initial", "the student before training, cut out of the teacher's text encoder"),
        ("run", "the training run: config, metrics, checkpoints"),
        ("student", "the student, exported for FluxPipeline"),
    ):
        print_line(f"  {folder / name!s:<28} {description}")
    print_line("Next, try:")
    cache, student = shlex.quote(str(folder / "cache")), shlex.quote(str(folder / "student"))
    for words in (
        f"inspect summary {cache}",
        f"inspect show {cache} --grep red",
        f"inspect images {cache} 5 6 7 --out strips.png",
        f"evaluate score {student} --pocket --num-prompts 500",
    ):
        print_line(f"  {program()} {words}")
    print_line(f"Open the report in a browser: {(folder / 'report.html').resolve().as_uri()}")
