"""`secondcast export`: write a student in the format of another program, or to a repository of the hub."""

from pathlib import Path
from typing import Annotated

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import Quiet, quiet_device, terminal
from secondcast.models.memory.options import TextQuantization
from secondcast.storage_schemas.errors import SettingsError, StudentError, reason
from secondcast.storage_schemas.progress import counted
from secondcast.trainer.run.usage_snippets import Form

_NEXT = {
    "diffusers": "pass it to the teacher's pipeline by the program in its README.md",
    "distillt5": "in the format of the published DistillT5 checkpoint, see its README.md",
    "comfyui": "copy it to ComfyUI/models/clip for the DistillT5 node",
}


def export(
    student: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder (its best checkpoint is exported), or an export.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="New folder; for comfyui a new .safetensors file. Without it --push uploads an export as it is.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Form,
        typer.Option(
            help="Format: diffusers for FluxPipeline, distillt5 for that of the published DistillT5, comfyui for the "
            "DistillT5 node."
        ),
    ] = "diffusers",
    quantize: Annotated[
        TextQuantization | None,
        typer.Option(help="Store the matrices in 8 or 4 bits (int8, nf4), with --to diffusers: smaller, less exact."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Scores for the model card, such as table.md of evaluate table."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Also upload the export to this repository of the hub; a new one is private."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make the repository public.")] = False,
    quiet: Quiet = False,
) -> None:
    """Export the best student of a run as a text_encoder_2 folder for FluxPipeline, or for another program.

    Example: secondcast export my-run my-student
    """
    _check_options(folder, to, quantize, scores, push, public)
    card_scores = None if scores is None else _markdown(scores)
    quiet_device("cpu")
    from secondcast.trainer.run.export_facts import FACTS_FILE
    from secondcast.trainer.run.push import check_target

    if push is not None:
        if folder is not None and (folder / FACTS_FILE).is_file():
            raise SettingsError(
                f"{folder} is an export already: upload it by `secondcast export {folder} --push {push}`, or give a "
                f"new folder"
            )
        _check_source(student, alone=folder is None)
        check_target(push)
    if folder is not None:
        _write(student, folder, to, quantize, card_scores, quiet)
    if push is not None:
        _upload(folder or student, push, public)


def _check_options(
    folder: Path | None,
    to: Form,
    quantize: TextQuantization | None,
    scores: Path | None,
    push: str | None,
    public: bool,
) -> None:
    if public and push is None:
        raise SettingsError("--public is given without --push: add --push OWNER/NAME, the repository to upload to")
    if push is not None and to == "comfyui":
        raise SettingsError(
            "--push uploads a folder with a model card, but --to comfyui writes one file: give --to diffusers, or "
            "distillt5"
        )
    if folder is not None:
        return
    if push is None:
        raise SettingsError("OUT is missing: give a new folder for the export")
    if other := [
        name for name, given in {"--to": to != "diffusers", "--quantize": quantize, "--scores": scores}.items() if given
    ]:
        raise SettingsError(
            f"{other[0]} is given without OUT, but --push alone uploads an export as it is: give a new folder as OUT"
        )


def _check_source(student: Path, *, alone: bool) -> None:
    """Raise an error for what cannot be uploaded, before the hub is asked. alone: without OUT."""
    from secondcast.models.student.folder import student_folder

    found = student_folder(student)
    if alone and found != student:
        raise SettingsError(
            f"{student} is a run, but --push alone uploads an export as it is: give a new folder as OUT, which is then "
            f"uploaded"
        )


def _markdown(file: Path) -> str:
    if file.suffix != ".md":
        raise SettingsError(
            f"--scores is {file}, expected a Markdown file (.md), such as table.md of `secondcast evaluate table --out`"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--scores {file} cannot be read ({reason(error)}): give a Markdown file") from error


def _write(
    student: Path, folder: Path, to: Form, quantize: TextQuantization | None, scores: str | None, quiet: bool
) -> None:
    from secondcast.trainer.run.export import export as run_export
    from secondcast.trainer.run.export import weights_text

    for remark in run_export(student, folder, to=to, quantize=quantize, picture=_picture(student), scores=scores):
        terminal(quiet).say(remark)
    print_line(f"{folder}: {weights_text(folder)}; {_NEXT[to]}")


def _picture(path: Path) -> Path | None:
    """The sheet of samples at the exported checkpoint of a run; None if there is none."""
    from secondcast.inspection.report.run import sample_file
    from secondcast.models.student.folder import step_of, student_folder

    try:
        step = step_of(student_folder(path).parent)
    except StudentError:
        # The export itself reports it.
        return None
    file = None if step is None else sample_file(path, step)
    return file if file is not None and file.is_file() else None


def _upload(folder: Path, repository: str, public: bool) -> None:
    from secondcast.trainer.run.push import push

    pushed = push(folder, repository, public=public)
    seen = "private" if pushed.private else "public"
    done = counted(pushed.files, "file") if pushed.changed else "no change"
    print_line(f"{pushed.url} ({seen}): {done}; `hf download {repository} --local-dir FOLDER` brings it back")
