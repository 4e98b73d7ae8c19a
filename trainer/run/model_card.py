"""The provenance of an exported student, as a record and as a model card."""

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.models.families.family import Family
from secondcast.models.families.flux import FLUX
from secondcast.models.families.registry import FAMILIES, family_named
from secondcast.models.student.folder import best_checkpoint
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.schema.manifest import Record
from secondcast.trainer.loss_kinds import LOSSES
from secondcast.trainer.run.folder import CONFIG_FILE
from secondcast.trainer.run.metrics import read_metrics
from secondcast.trainer.run.usage_snippets import Form as Form
from secondcast.trainer.run.usage_snippets import diffusers_text
from secondcast.trainer.settings import MAIN, RecordedWith, RunConfig

FACTS_FILE = "secondcast.json"


class ExportFacts(Record):
    """Provenance of an exported student: FACTS_FILE of a folder, or the metadata of a single file.

    guidance: guidance values of its training; None if none was recorded.
    validation_loss: at the exported checkpoint; None if not measured.
    replay_error: the loss of a perfect student on the machine that trained it; None if not measured.
    recorded: None for runs of older versions, and on text caches alone.
    family: of the teacher; exports of older versions are of the first one.
    """

    teacher: str
    teacher_digest: str
    sampling_digest: str
    text_length: int
    guidance: tuple[float, ...] | None
    settings: dict[str, Any]
    checkpoint: str
    validation_loss: float | None
    replay_error: float | None
    created_by: str
    recorded: RecordedWith | None = None
    family: str = FLUX.name

    @property
    def teacher_family(self) -> Family:
        """The family of the teacher; that of the recording where older versions stated no other."""
        return family_named(self.family if self.recorded is None else self.recorded.family)


def facts_of(path: Path, student: Path) -> ExportFacts | None:
    """The facts of a run folder or of an export; None for a student without any.

    student: folder of the exported student within `path`. Raises StudentError for an unreadable file.
    """
    try:
        if student != path:
            return _facts_of_run(path, student.parent.name)
        if (path / FACTS_FILE).is_file():
            return ExportFacts.model_validate_json((path / FACTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        file = path / (CONFIG_FILE if student != path else FACTS_FILE)
        raise StudentError(f"{file} cannot be read ({problem}): export from another copy of {path}") from error
    return None


def _facts_of_run(run: Path, checkpoint: str) -> ExportFacts:
    config = RunConfig.model_validate_json((run / CONFIG_FILE).read_bytes())
    metrics = read_metrics(run)
    step = int(checkpoint.rsplit("-", 1)[-1])
    losses = [entry["validation_loss"] for entry in metrics if entry.get("step") == step and "validation_loss" in entry]
    replay_errors = [entry["replay_error"] for entry in metrics if "replay_error" in entry]
    return ExportFacts(
        # --backbone may name a folder with a transformer alone.
        teacher=config.recorded.teacher if config.recorded else config.backbone,
        teacher_digest=config.teacher_digest,
        sampling_digest=", ".join(sorted({trained_on.sampling_digest for trained_on in config.caches.values()})),
        text_length=config.text_length,
        guidance=config.guidance,
        settings=config.settings.json_value(),
        checkpoint=checkpoint,
        validation_loss=_best_loss(run, checkpoint) if not losses else losses[-1],
        replay_error=replay_errors[-1] if replay_errors else None,
        created_by=f"secondcast {version('secondcast')}",
        recorded=config.recorded,
        family=config.family,
    )


def _best_loss(run: Path, checkpoint: str) -> float | None:
    with suppress(StudentError):
        best = best_checkpoint(run)
        return best[1] if best is not None and best[0].name == checkpoint else None
    return None


_CARD = """---
library_name: transformers{base_model}
tags: [text-encoder, {tag}, distillation, secondcast]
---

# A student of {teacher}

{encoder} encoder with projection, {parameters:,} parameters ({weights}), distilled with Secondcast from the {taught}
encoder of {teacher}. It replaces `{slot}`.{tokenizer}

It was trained at **{text_length} text tokens**: always pass `max_sequence_length={text_length}`. {padding} {guidance}

{use}
## Training

{losses}{recipe}
## Licence

The student was trained on outputs of its teacher, {teacher}.
The teacher's licence determines what that means for the student and for pictures made with it: read it before you use
or redistribute the student.{non_commercial}
"""

_USE_DISTILLT5 = """The folder has the format of the published DistillT5 checkpoint: its tensor names, its class
`T5EncoderWithProjection`, its keys `project_in_dim` and `project_out_dim`; `text_length` is added, and `out_dim`, from
which the published class reads its output width. Programs that load that checkpoint should load this one (its class
needs transformers 4); `secondcast generate` and `secondcast export` accept it as well.
"""

_NON_COMMERCIAL = """ {model} has a non-commercial licence with terms for
derivatives and outputs."""


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
) -> str:
    """README.md of an export.

    weights: form and bytes of its weights, in words.
    encoder: model_type of a student that is not T5.
    family: of the teacher.
    """
    teacher = f"`{facts.teacher}`" if facts else "an unrecorded teacher"
    return _CARD.format(
        base_model=f"\nbase_model: {facts.teacher}" if facts and _is_hub_name(facts.teacher) else "",
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
        non_commercial="".join(
            _NON_COMMERCIAL.format(model=model)
            for known in FAMILIES
            for model in known.non_commercial
            if model in teacher
        ),
    )


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
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


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
