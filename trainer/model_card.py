"""What an export says about itself: where the student comes from, as a record and as a model card."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from models.student import BEST_FILE
from storage_schemas.errors import BadStudent
from storage_schemas.manifest import Record
from trainer.run_folder import CONFIG_FILE, METRICS_FILE
from trainer.settings import RunConfig

FACTS_FILE = "understudy.json"

Form = Literal["diffusers", "distillt5", "comfyui"]


class ExportFacts(Record):
    """Where an exported student comes from; FACTS_FILE of a folder, the metadata of a single file.

    guidance: the values it was trained with, None where none was recorded. validation_loss: at the exported
    checkpoint; replay_floor: the loss of a perfect student on the machine that trained it; None where not measured.
    """

    teacher: str
    teacher_digest: str
    sampling_digest: str
    text_length: int
    guidance: tuple[float, ...] | None
    settings: dict[str, Any]
    checkpoint: str
    validation_loss: float | None
    replay_floor: float | None
    created_by: str


def facts_of(path: Path, student: Path) -> ExportFacts | None:
    """The facts of a run folder or of an export; None for a student without any.

    student: the folder of it whose student is exported. Raises BadStudent for a file that cannot be read.
    """
    try:
        if student != path:
            return _facts_of_run(path, student.parent.name)
        if (path / FACTS_FILE).is_file():
            return ExportFacts.model_validate_json((path / FACTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        file = path / (CONFIG_FILE if student != path else FACTS_FILE)
        raise BadStudent(f"{file} cannot be read ({problem}): export from another copy of {path}") from error
    return None


def _facts_of_run(run: Path, checkpoint: str) -> ExportFacts:
    config = RunConfig.model_validate_json((run / CONFIG_FILE).read_bytes())
    metrics = _metrics(run)
    step = int(checkpoint.rsplit("-", 1)[-1])
    losses = [entry["validation_loss"] for entry in metrics if entry.get("step") == step and "validation_loss" in entry]
    floors = [entry["replay_floor"] for entry in metrics if "replay_floor" in entry]
    return ExportFacts(
        teacher=config.backbone,
        teacher_digest=config.teacher_digest,
        sampling_digest=", ".join(sorted({trained_on.sampling_digest for trained_on in config.caches.values()})),
        text_length=config.text_length,
        guidance=config.guidance,
        settings=config.settings.flat(),
        checkpoint=checkpoint,
        validation_loss=_best_loss(run, checkpoint) if not losses else losses[-1],
        replay_floor=floors[-1] if floors else None,
        created_by=f"understudy {version('understudy')}",
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / METRICS_FILE
    entries = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            # The last line of a killed run may be torn.
            continue
    return entries


def _best_loss(run: Path, checkpoint: str) -> float | None:
    marker = run / BEST_FILE
    best = json.loads(marker.read_bytes()) if marker.is_file() else {}
    return best.get("loss") if best.get("checkpoint") == checkpoint else None


_CARD = """---
library_name: transformers{base_model}
tags: [text-encoder, flux, distillation, understudy]
---

# A student of {teacher}

A T5 encoder with projection, {parameters:,} parameters, distilled by Understudy from the T5 text encoder of
{teacher}. It takes the place of `text_encoder_2`.

It was trained at **{text_length} text tokens**: always pass `max_sequence_length={text_length}`. FluxPipeline's own
default of 512 gives it hundreds of padding tokens that it never saw. {guidance}

{use}
## What it was trained with

{recipe}
## Licence

The student was trained on what its teacher, {teacher}, computes.
What that means for the student, and for the pictures made with it, is for the teacher's licence to say: see the
teacher's licence before you use it or pass it on.{non_commercial}
"""

_USE_DIFFUSERS = """```python
import torch
from diffusers import FluxPipeline
from transformers import AutoModel

student = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True, torch_dtype=torch.bfloat16)
pipeline = FluxPipeline.from_pretrained("{teacher}", text_encoder_2=student, torch_dtype=torch.bfloat16)
image = pipeline("a red circle", max_sequence_length={text_length}).images[0]
```

`trust_remote_code` runs `student_network.py` of this folder, which needs torch and transformers only.
"""

_USE_DISTILLT5 = """The folder has the form of the published DistillT5 checkpoint: its tensor names, its class
`T5EncoderWithProjection`, its keys `project_in_dim` and `project_out_dim`; `text_length` is added. What loads that
checkpoint is meant to load this one; `understudy generate` and `understudy export` take it as well.
"""

_NON_COMMERCIAL = """ FLUX.1-dev comes under a non-commercial licence, which states what
holds for derivatives and for outputs."""


def card_of(form: Form, facts: ExportFacts | None, *, text_length: int, parameters: int) -> str:
    """README.md of an export."""
    teacher = f"`{facts.teacher}`" if facts else "an unrecorded teacher"
    use = _USE_DIFFUSERS if form == "diffusers" else _USE_DISTILLT5
    return _CARD.format(
        base_model=f"\nbase_model: {facts.teacher}" if facts and _is_hub_name(facts.teacher) else "",
        teacher=teacher,
        parameters=parameters,
        text_length=text_length,
        guidance=_guidance_text(facts),
        use=use.format(teacher=facts.teacher if facts else "TEACHER", text_length=text_length),
        recipe=_recipe(facts),
        non_commercial=_NON_COMMERCIAL if "FLUX.1-dev" in teacher else "",
    )


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _guidance_text(facts: ExportFacts | None) -> str:
    if facts is None or not facts.guidance:
        return "No guidance was recorded."
    return f"It was trained for a guidance of **{min(facts.guidance):g} to {max(facts.guidance):g}**."


def _recipe(facts: ExportFacts | None) -> str:
    if facts is None:
        return "Not recorded: this student was not exported from a run folder.\n"
    rows = {
        "validation loss at this checkpoint": _loss_text(facts.validation_loss),
        "replay floor (loss of a perfect student)": _loss_text(facts.replay_floor),
        "checkpoint": facts.checkpoint,
        "teacher digest": f"`{facts.teacher_digest}`",
        "sampling digest": f"`{facts.sampling_digest}`",
        "written by": facts.created_by,
        **{name.replace("_", "-"): _shown(value) for name, value in facts.settings.items()},
    }
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _loss_text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.6g}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|")
