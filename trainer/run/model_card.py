"""The model card of an exported student."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import licence_of
from secondcast.trainer.loss_kinds import LOSSES
from secondcast.trainer.run.export_facts import ExportFacts
from secondcast.trainer.run.usage_snippets import POCKET, diffusers_text
from secondcast.trainer.run.usage_snippets import Form as Form
from secondcast.trainer.settings import MAIN

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME of a repository."""


_CARD = """---
library_name: transformers{metadata}
tags: [text-encoder, {tag}, distillation, secondcast]
---

# A student of {teacher}

{encoder} encoder with projection, {parameters:,} parameters ({weights}), distilled with Secondcast from the {taught}
encoder of {teacher}. It replaces `{slot}`.{tokenizer}

It was trained at **{text_length} text tokens**: always pass `max_sequence_length={text_length}`. {padding} {guidance}

{picture}{use}
## Training

{losses}{recipe}
{scores}## Licence

The student was trained on outputs of its teacher, {teacher}.
The teacher's licence determines what that means for the student and for pictures made with it: read it before you use
or redistribute the student.{licence}
"""

PICTURE_FILE = "samples.png"
"""A sheet of samples, in the folder of an export."""
_PICTURE = f"""![pictures by the teacher and by this student]({PICTURE_FILE})

Teacher and student side by side, sampled from the same recorded noise at this checkpoint.

"""
_SCORES = """## Scores

{scores}

"""

_USE_DISTILLT5 = """The folder has the format of the published DistillT5 checkpoint: its tensor names, its class
`T5EncoderWithProjection`, its keys `project_in_dim` and `project_out_dim`; `text_length` is added, and `out_dim`, from
which the published class reads its output width. Programs that load that checkpoint should load this one (its class
needs transformers 4); `secondcast generate` and `secondcast export` accept it as well.
"""

_NON_COMMERCIAL = """ {model} has a non-commercial licence with terms for
derivatives and outputs: [{licence.name}]({licence.link})."""
_NO_LICENCE = """ This card cannot name it: the teacher
is not named after a supported model.{which}"""
_WHICH = """ {models} have non-commercial licences, which also
apply if it was made from one of them."""

_OWN_TOKENIZER = """
It reads prompts with its own tokenizer, which is in this folder, and detects padding by itself."""

_READ = """The pipeline
accepts up to {most}, and by default adds padding tokens that the student has never seen."""
_MASKED = """Padding is neither
read nor given: the student makes the pipeline's mask itself where it gets none."""
_CLEANED = """ The pipeline cleans prompts
with `beautifulsoup4` and `ftfy`; without these packages it only warns, and tokenises another text than in training."""
_CARDS: dict[str, str] = {name: kind.card for name, kind in LOSSES.items()}
_PREDICTING = [name for name, kind in LOSSES.items() if kind.predicts]
_NO_VISION = """No stage used the vision loss: the student imitates embeddings or early blocks; expect worse
pictures than from a student trained with the vision loss.
"""


def card_of(
    form: Form,
    facts: ExportFacts | None,
    *,
    text_length: int,
    parameters: int,
    weights: str,
    encoder: str | None = None,
    own_tokenizer: bool = False,
    family: Family = FLUX,
    picture: bool = False,
    scores: str | None = None,
) -> str:
    """README.md of an export.

    weights: form and bytes of its weights, in words.
    encoder: model_type of a student that is not T5.
    family: of the teacher.
    picture: whether PICTURE_FILE is beside it.
    scores: Markdown of measured scores.
    """
    teacher = f"`{facts.teacher}`" if facts else "an unrecorded teacher"
    return _CARD.format(
        metadata="".join(f"\n{key}: {value}" for key, value in _metadata(facts).items()),
        tag=family.name.split("-")[0],
        teacher=teacher,
        slot=family.slot,
        taught="T5 text" if family.text_layers is None else "text",
        padding=(_MASKED if family.masks_text else _READ).format(most=family.largest_text_length)
        + (_CLEANED if family.text_cleaning else ""),
        parameters=parameters,
        weights=weights,
        text_length=text_length,
        encoder="A T5" if encoder is None else f"A text (`{encoder}`)",
        tokenizer=_OWN_TOKENIZER if own_tokenizer else "",
        guidance=_guidance_text(facts),
        use=_use(form, facts, family, text_length=text_length, own_tokenizer=own_tokenizer, is_t5=encoder is None),
        losses="" if facts is None else losses_text(stages_of(facts.settings), facts.settings.get("loss_fn")),
        recipe=_recipe(facts),
        licence=_licence_text(facts, family),
        picture=_PICTURE if picture else "",
        scores="" if scores is None else _SCORES.format(scores=scores.strip()),
    )


def _metadata(facts: ExportFacts | None) -> dict[str, str]:
    """Base model and licence, as the hub reads them."""
    if facts is None:
        return {}
    known = licence_of(facts.teacher)
    licence = (
        {}
        if known is None
        else {
            "license": known[1].identifier,
            "license_name": known[1].name,
            "license_link": known[1].link,
        }
    )
    base_model = facts.teacher if _is_hub_name(facts.teacher) else None
    return {key: value for key, value in {**licence, "base_model": base_model}.items() if value is not None}


def _licence_text(facts: ExportFacts | None, family: Family) -> str:
    if facts is not None and facts.teacher == POCKET:
        return " The pocket is a part of Secondcast and has its licence."
    known = None if facts is None else licence_of(facts.teacher)
    if known is None:
        models = [model for model, licence in family.licences.items() if licence.non_commercial]
        return _NO_LICENCE.format(which=_WHICH.format(models=" and ".join(models)) if models else "")
    model, licence = known
    if licence.non_commercial:
        return _NON_COMMERCIAL.format(model=model, licence=licence)
    return f" It is {licence.identifier if licence.name is None else f'[{licence.name}]({licence.link})'}."


def _use(
    form: Form, facts: ExportFacts | None, family: Family, *, text_length: int, own_tokenizer: bool, is_t5: bool
) -> str:
    if form != "diffusers":
        return _USE_DISTILLT5
    return diffusers_text(
        facts.teacher if facts else "TEACHER",
        facts.recorded if facts else None,
        family,
        guidance=facts.guidance if facts else None,
        text_length=text_length,
        own_tokenizer=own_tokenizer,
        is_t5=is_t5,
    )


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def _guidance_text(facts: ExportFacts | None) -> str:
    if facts is None or not facts.guidance:
        return "No guidance was recorded."
    return f"It was trained with guidance **{min(facts.guidance):g} to {max(facts.guidance):g}**."


def stages_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run, in order; empty if the settings do not list them."""
    return [stage for stage in settings.get("stages", ()) if isinstance(stage, dict)]


def losses_text(stages: Sequence[dict[str, Any]], loss_fn: str | None = None) -> str:
    """A numbered list of stages in plain words; missing keys and None are skipped.

    loss_fn: name of the function that took the place of the vision loss.
    """
    lines = [f"{number}. {_stage_text(stage, loss_fn)}\n" for number, stage in enumerate(stages, 1)]
    imitates = stages and all(stage.get("loss") in LOSSES and not LOSSES[stage["loss"]].predicts for stage in stages)
    return "".join(lines) + ("\n" if lines else "") + (_NO_VISION + "\n" if imitates else "")


def _stage_text(stage: dict[str, Any], loss_fn: str | None) -> str:
    loss = stage.get("loss")
    imitated = _CARDS.get(str(loss), f"{loss} loss")
    if loss_fn is not None and loss in _PREDICTING:
        imitated = f"the prediction, compared by the function {loss_fn} in place of the paper's loss"
    formats = {
        "steps": "{:,} steps",
        "batch_size": "batch {}",
        "learning_rate": "learning rate {:g}",
        "data_order": "order {}",
    }
    parts = [form.format(stage[key]) for key, form in formats.items() if stage.get(key) is not None]
    if caches := stage.get("caches"):
        parts.append(f"caches {_shown(caches)}")
    return imitated + (f" ({', '.join(parts)})" if parts else "")


def _recipe(facts: ExportFacts | None) -> str:
    if facts is None:
        return "Not recorded: this student was not exported from a run folder.\n"
    rows = {
        "validation loss at this checkpoint": _loss_text(facts.validation_loss),
        "replay error (loss of a perfect student)": _loss_text(facts.replay_error),
        "checkpoint": facts.checkpoint,
        "teacher digest": f"`{facts.teacher_digest}`",
        "sampling digest": f"`{facts.sampling_digest}`",
        "written by": facts.created_by,
        **{name.replace("_", "-"): _shown(value) for name, value in _flat(facts.settings).items()},
    }
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in settings.items() if name != "stages"}
    for stage in stages_of(settings):
        spoken = "" if stage.get("name") == MAIN else f"{stage.get('name')} "
        values |= {f"{spoken}{key}": value for key, value in stage.items() if key != "name" and value is not None}
    return values


def _loss_text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.6g}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|")
