"""`secondcast init-student`: make an initial student out of the teacher's own text encoder."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import is_named_as_a_file, json_bytes
from secondcast.commands.shell.resolve import (
    POCKET,
    Device,
    PromptSources,
    Quiet,
    Revision,
    TeacherName,
    quiet_device,
    resolve_context_projection,
    resolve_teacher,
    student_source,
    terminal,
)
from secondcast.models.student.initial.settings import InitialOptions, check_makes_students
from secondcast.storage_schemas.errors import PromptsError, SettingsError
from secondcast.storage_schemas.io.digests import digest, xxh3_128

if TYPE_CHECKING:
    import torch

    from secondcast.models.student.initial.initial_student import TeacherEncoder, TokenIds
    from secondcast.models.student.initial.size import Size
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.prompts import Prompt

_T5_SIZES = ("small", "base", "large")
_LAYERS_BY_WIDTH = re.compile(r"([0-9]+)x([0-9]+)")
# One prompt in so many is held out, among them all that training holds out.
_HELD_OUT_EVERY = 10


def init_student(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the student.")],
    teacher: TeacherName,
    prompts: PromptSources,
    asked: InitialOptions,
    revision: Revision = None,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Make an initial student out of the teacher's own text encoder. Run the same command again to resume.

    The student is a folder for train --student. Training from it needs fewer steps than from random weights.

    Example: secondcast init-student initial --teacher pocket --prompts prompts.txt --size pocket-small
    """
    _check_flags(out, asked)
    from secondcast.cache_builder.prompts.files import read_prompts
    from secondcast.cache_builder.text_stage import tokenised_prompts

    texts = read_prompts(prompts, limit=asked.limit).texts
    torch_device, progress = quiet_device(device), terminal(quiet)
    from secondcast.models.student.initial.initial_student import Maker
    from secondcast.models.student.initial.work_folder import WorkFolder
    from secondcast.models.student.student import save_student

    found = resolve_teacher(teacher, ("large_text_encoder", "large_tokenizer"), revision)
    check_makes_students(found.family, teacher)
    length = found.checked_text_length(asked.text_length)
    encoder = _encoder_of(found, teacher, revision, asked, torch_device, length)
    size = size_of(asked.size, encoder.weights.config)
    read = tokenised_prompts(texts, found, text_length=length)[0]
    settings = _statistics_settings(found, encoder, read, asked, torch_device)
    wanted = {**settings, "size": asked.size, "kind": asked.kind, "from": asked.source}
    wanted |= {"projection_rank": asked.projection_rank}
    work = WorkFolder(out.absolute())
    if work.check_out(wanted):
        print_line(f"{out}: exists already")
        return
    ids = _token_ids(read, length, encoder.identity.pad_token_id)
    maker = Maker(
        encoder, size, ids, work, kind=asked.kind, batch_size=asked.batch_size, progress=progress,
        projection_rank=asked.projection_rank,
    )  # fmt: skip
    with work.opened(settings):
        made, best = maker.make(asked.source)
        for one in made:
            print_line(one.text)
        with work.student() as folder:
            save_student(best.student, folder, tokenizer=found.tokenizer_files())
            record = {"asked": wanted, "kept": best.kind, "made": [one.facts for one in made]}
            (folder / work.record_name).write_bytes(json_bytes(record))
    print_line(f"{out}: {best.kind}; give it to train --student")


def _check_flags(out: Path, asked: InitialOptions) -> None:
    if is_named_as_a_file(out):
        raise SettingsError(f"OUT is {out}, which is named like a file, expected a folder: give {out.with_suffix('')}")
    if asked.kind == "pretrained" and asked.source is None:
        raise SettingsError("--kind pretrained needs --from, a T5 v1.1 such as google/t5-v1_1-base: give --from")
    if asked.kind in ("cut", "shallow") and asked.source is not None:
        raise SettingsError(
            f"--from is {asked.source}, but --kind {asked.kind} is made of the teacher's own encoder: remove --from, "
            f"or give --kind pretrained"
        )


def size_of(name: str, teacher: dict[str, Any]) -> "Size":
    """A size by its name, or by LAYERSxWIDTH in the teacher's proportions; SettingsError for any other text."""
    from secondcast.models.cost.shapes import STUDENT_SIZES
    from secondcast.models.student.initial.size import Size

    if (match := _LAYERS_BY_WIDTH.fullmatch(name)) is not None:
        return Size.in_proportion(int(match[1]), int(match[2]), teacher)
    if name.startswith(f"{POCKET}-"):
        return Size.of_student(json.loads((Path(student_source(name)) / "config.json").read_bytes()), teacher)
    if name not in _T5_SIZES:
        raise SettingsError(
            f"--size is {name!r}, expected {', '.join(_T5_SIZES)}, pocket-tiny, pocket-small, pocket-base, or "
            f"LAYERSxWIDTH such as 12x768"
        )
    return Size.of_student(STUDENT_SIZES[name], teacher)


def _encoder_of(
    found: "TeacherFolder",
    teacher: str,
    revision: str | None,
    asked: InitialOptions,
    device: "torch.device",
    length: int,
) -> "TeacherEncoder":
    from secondcast.models.schedule import DTYPES
    from secondcast.models.student.initial.encoder_weights import EncoderWeights
    from secondcast.models.student.initial.initial_student import TeacherEncoder
    from secondcast.models.teacher.folder import part_source
    from secondcast.models.teacher.text_encoder import TeacherTextEncoder

    part = found.part("large_text_encoder")
    weights = EncoderWeights.open(part, found.config("large_text_encoder"), part_source(part))
    # Also downloads the configuration of the transformer, which the identity covers.
    context_ID = resolve_context_projection(teacher, None, revision).context_ID
    return TeacherEncoder(
        identity=found.identity(text_length=length, hashed=False),
        load=lambda: TeacherTextEncoder.load(found, dtype=DTYPES[asked.dtype], device=device).model,
        weights=weights,
        context_ID=context_ID.to(device),
    )


def _statistics_settings(
    found: "TeacherFolder",
    encoder: "TeacherEncoder",
    read: "list[Prompt]",
    asked: InitialOptions,
    device: "torch.device",
) -> dict[str, Any]:
    """What statistics and context errors depend on."""
    return {
        "teacher": digest(found.weight_hashes("large_text_encoder")),
        "text_projection": xxh3_128(encoder.context_ID.cpu().numpy().tobytes()),
        "tokenizer": digest(encoder.identity.tokenizer),
        "prompts": digest([[prompt.id, list(prompt.token_ids)] for prompt in read]),
        "text_length": encoder.identity.text_length,
        "batch_size": asked.batch_size,
        "dtype": asked.dtype,
        "device": device.type,
    }


def _token_ids(read: "list[Prompt]", length: int, pad_token_id: int) -> "TokenIds":
    """Padded token ids, one prompt in ten of them held out by its id."""
    import torch

    from secondcast.models.student.initial.initial_student import TokenIds

    if len(read) < 2:
        raise PromptsError(
            f"there is {len(read)} prompt, expected at least 2: one is held out to measure the context error"
        )
    held = [prompt for prompt in read if prompt.held_out or int(prompt.id[-8:], 16) % _HELD_OUT_EVERY == 0]
    if not 0 < len(held) < len(read):
        held = read[-1:]
    kept = {prompt.id for prompt in held}

    def padded(prompts: "list[Prompt]") -> torch.Tensor:
        rows = [[*prompt.token_ids, *[pad_token_id] * (length - len(prompt.token_ids))] for prompt in prompts]
        return torch.tensor(rows, dtype=torch.int64)

    return TokenIds(fitted_NT=padded([prompt for prompt in read if prompt.id not in kept]), held_NT=padded(held))
