"""Export the best student of a run, or an earlier export, in the format of another program."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import family_of_layers
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.options import TextQuantization
from secondcast.models.student.distillt5 import (
    COMFYUI_TEXT_LENGTH,
    WEIGHTS_FILE,
    comfyui_differences,
    published_config,
    published_tensors,
    with_full_projection,
)
from secondcast.models.student.encoder_student_network import EncoderStudent
from secondcast.models.student.folder import BEST_FILE, checkpoints, config_of, student_folder, weight_bytes
from secondcast.models.student.quantizing import quantized, with_stored_scales
from secondcast.models.student.student import Student, load_student, save_student
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.student.tokens import TOKENIZER_CONFIG, has_own_tokens, portable
from secondcast.storage_schemas.errors import SettingsError, reason
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.progress import size_text
from secondcast.trainer.run.export_facts import FACTS_FILE, ExportFacts, facts_of
from secondcast.trainer.run.model_card import PICTURE_FILE, Form, card_of

_CARD_FILE = "README.md"
_COMFYUI_ENDING = ".safetensors"
# Written by every export; the rest of a student's folder is its tokenizer.
_NOT_TOKENIZER = (".safetensors", ".index.json", ".bin", ".gguf", ".py", ".md", ".png", ".tmp")


def export(
    path: Path,
    out: Path,
    *,
    to: Form = "diffusers",
    quantize: TextQuantization | None = None,
    picture: Path | None = None,
    scores: str | None = None,
) -> list[str]:
    """Write a student atomically; returns notes on limitations in the target program.

    path: run folder (its best checkpoint is exported), or an export.
    out: new folder; for `comfyui` a new .safetensors file.
    to: format of the export.
    quantize: form of its matrices; None: as they are.
    picture: sheet of samples (PNG) for the model card; None: that of an earlier export, if it has one.
    scores: Markdown of measured scores for the model card.

    Raises StudentError if there is no student, SettingsError for an `out` that exists or cannot be written, and for a
    format or a quantization that does not support this kind of student.
    """
    out = out.resolve()
    _check_is_free(out, to)
    source = student_folder(path)
    student, facts = load_student(source), facts_of(path, source)
    _check_is_held(student, facts, path, to, quantize)
    if isinstance(student, SecondcastStudent):
        student = student if to == "diffusers" else with_full_projection(student)
        student = with_stored_scales(student) if quantize is None else quantized(student, quantize)
    with _staged(out) as temporary:
        if to == "comfyui":
            save_file(published_tensors(student), temporary, metadata=_metadata(facts))
            # safetensors writes files that only the owner can read.
            temporary.chmod(durable.usual_mode(temporary.parent))
        else:
            _write_folder(student, facts, source, temporary, to, picture=picture, scores=scores)
    return [*_unjudged_remarks(path, source), *(_comfyui_remarks(student) if to == "comfyui" else [])]


def _unjudged_remarks(path: Path, source: Path) -> list[str]:
    if source.parent not in checkpoints(path) or (path / BEST_FILE).is_file():
        return []
    return [f"{path} has no validated checkpoint: exported the last one, {source.parent.name}"]


def _check_is_held(
    student: Student, facts: ExportFacts | None, path: Path, to: Form, quantize: TextQuantization | None
) -> None:
    if quantize is not None and to != "diffusers":
        raise SettingsError(
            f"--quantize is {quantize}, but --to {to} is a format of floating-point weights: omit one of both options"
        )
    if (own := getattr(student.config, "quantization", None)) and (quantize is not None or to != "diffusers"):
        raise SettingsError(
            f"{path} has {own} weights already, but {f'--to {to}' if quantize is None else f'--quantize {quantize}'} "
            f"needs floating-point ones: give the run that it was exported from"
        )
    if isinstance(student, EncoderStudent) and quantize is not None:
        raise SettingsError(
            f"{path} is {_described(student)}, but --quantize only supports T5 students that read the teacher's "
            f"tokens: omit the option"
        )
    if isinstance(student, EncoderStudent) and to != "diffusers":
        raise SettingsError(
            f"{path} is {_described(student)}, but --to {to} only supports T5 students that read the teacher's tokens: "
            f"give --to diffusers"
        )
    family = _family_of(student, facts)
    masks = getattr(student.config, "masks_padding", False)
    if to != "diffusers" and (family.slot != FLUX.slot or masks):
        raise SettingsError(
            f"{path} is a student of {family.title}, but --to {to} is a format for FLUX.1: give --to diffusers"
        )


def _family_of(student: Student, facts: ExportFacts | None) -> Family:
    return facts.teacher_family if facts else family_of_layers(getattr(student.config, "hidden_state_layers", None))


def _described(student: EncoderStudent) -> str:
    tokens = "the tokens of a language model" if hasattr(student.config, "hidden_state_layers") else "its own tokenizer"
    return f"a {student.config.encoder_config['model_type']!r} student with {tokens}"


def _check_is_free(out: Path, to: Form) -> None:
    if to == "comfyui":
        if out.suffix != _COMFYUI_ENDING:
            raise SettingsError(
                f"{out} has the suffix {out.suffix!r}, expected {_COMFYUI_ENDING!r}: --to comfyui writes one file; "
                f"give OUT a name such as {out.stem}{_COMFYUI_ENDING}"
            )
        if out.exists():
            raise SettingsError(f"{out} exists: give a new file for the export")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists and is not empty: give a new folder for the export")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            durable.sync(file)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
        durable.sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"{out} cannot be written ({reason(error)}): give another OUT") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_folder(
    student: Student,
    facts: ExportFacts | None,
    source: Path,
    folder: Path,
    form: Form,
    *,
    picture: Path | None,
    scores: str | None,
) -> None:
    if facts is not None and facts.guidance:
        student.config.trained_guidance = [min(facts.guidance), max(facts.guidance)]
    if form == "diffusers":
        save_student(student, folder, tokenizer=None)
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(published_config(student), indent=2) + "\n")
        save_file(published_tensors(student), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / WEIGHTS_FILE).chmod(durable.usual_mode(folder))
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_TOKENIZER) and file.name not in ("config.json", FACTS_FILE):
            copied = file.read_bytes()
            (folder / file.name).write_bytes(portable(copied) if file.name == TOKENIZER_CONFIG else copied)
    if picture is None and (source / PICTURE_FILE).is_file():
        picture = source / PICTURE_FILE
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE_FILE)
    if facts is not None:
        (folder / FACTS_FILE).write_text(facts.model_dump_json(indent=1) + "\n")
    card = card_of(
        form,
        facts,
        text_length=student.config.text_length,
        parameters=parameter_count(student),
        weights=weights_text(folder),
        encoder=student.config.encoder_config["model_type"] if isinstance(student, EncoderStudent) else None,
        own_tokenizer=has_own_tokens(source),
        family=_family_of(student, facts),
        picture=picture is not None,
        scores=scores,
    )
    (folder / _CARD_FILE).write_text(card, encoding="utf-8")


def weights_text(export: Path) -> str:
    """The weights of an export in a few words, such as "int8 weights, 664.8 KiB"."""
    return f"{config_of(export).get('quantization', 'float32')} weights, {size_text(weight_bytes(export))}"


def _metadata(facts: ExportFacts | None) -> dict[str, str]:
    return {"format": "pt"} | ({} if facts is None else {"secondcast": facts.model_dump_json()})


def _comfyui_remarks(student: SecondcastStudent) -> list[str]:
    remarks = []
    if different := comfyui_differences(student):
        remarks.append(
            "the DistillT5 node of ComfyUI has the fixed sizes of T5 v1.1 base and cannot load this student, which "
            f"has {', '.join(different)} (the node's values in parentheses)"
        )
    if student.config.text_length != COMFYUI_TEXT_LENGTH:
        remarks.append(
            f"the DistillT5 node of ComfyUI pads prompts to {COMFYUI_TEXT_LENGTH} tokens, but this student was trained "
            f"at {student.config.text_length}: expect worse images there than in FluxPipeline"
        )
    return remarks
