"""What trained students do where they were not trained: other sampler steps, guidance, text length, a LoRA's backbone.

Every score is kept per caption, so that student and teacher are compared on the same captions and noise.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as remembered
from pathlib import Path
from typing import Any

from secondcast.pocket.training.networks import TEXT_LENGTH

STEPS, GUIDANCE = 20, 3.5
TEACHER = "teacher"
LORA = "lora"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How pictures are sampled; what it does not say is as the students were trained and scored.

    backbone: "pocket" or LORA. recoloured: captions and colours of the LoRA.
    """

    question: str
    value: str
    steps: int = STEPS
    guidance: float = GUIDANCE
    text_length: int = TEXT_LENGTH
    backbone: str = "pocket"
    recoloured: bool = False

    @property
    def usual(self) -> bool:
        """Whether it is what students were trained for."""
        return (self.steps, self.guidance, self.text_length) == (STEPS, GUIDANCE, TEXT_LENGTH)

    @property
    def work(self) -> float:
        """Cost relative to the usual setting."""
        # Image tokens count as well.
        return self.steps / STEPS * (36 + self.text_length) / (36 + TEXT_LENGTH)


def settings() -> list[Setting]:
    """The usual setting once, then one thing changed at a time."""
    found = [Setting(question="usual", value="")]
    found += [Setting(question="steps", value=f"{n}", steps=n) for n in (4, 10, 28)]
    found += [Setting(question="guidance", value=f"{g:g}", guidance=g) for g in (1.0, 2.0, 5.0, 7.0, 10.0)]
    found += [Setting(question="text-length", value=f"{n}", text_length=n) for n in (16, 48, 96)]
    return [*found, *lora_settings()]


def lora_settings() -> list[Setting]:
    """Plain: both as they were. Recoloured: the LoRA'd backbone by the new colour."""
    return [
        Setting(question=LORA, value="before"),
        Setting(question=LORA, value="after", backbone=LORA, recoloured=True),
    ]


def lora_captions(count: int) -> list[str]:
    """Held-out captions, half of them with the recoloured word, those first."""
    from experiments.pocket_lora import OLD
    from secondcast.pocket.world import captions

    texts = captions(6 * count, seed=0, split="heldout")
    has = [text for text in texts if re.search(rf"\b{OLD}\b", text)]
    without = [text for text in texts if text not in set(has)]
    half = count // 2
    if len(has) < half:
        raise ValueError(f"{len(has)} of {len(texts)} captions have {OLD!r}, expected {half} or more")
    return has[:half] + without[: count - half]


def ask(place: Path, setting: Setting, who: str, folder: Path, count: int) -> dict[str, Any]:
    """Scores of each caption. who: "teacher", or the name of a run below `folder`/runs."""
    from secondcast.pocket.world import captions
    from secondcast.storage_schemas.progress import Silent

    texts = lora_captions(count) if setting.question == LORA else captions(count, seed=0, split="heldout")
    studio = _studio(setting, folder)
    embed = _embed(who, setting.text_length, folder)
    with Silent().bar("", total=0, done=0, unit="") as bar:
        images_NHWC = studio.images(embed, texts, batch_size=64, bar=bar)
    values = _values(images_NHWC, texts, setting)
    return {"question": setting.question, "value": setting.value, "who": who, "values": values}


def _values(images_NHWC: Any, texts: Sequence[str], setting: Setting) -> list[dict[str, float]]:
    from secondcast.pocket.scorer import score

    with _palette(setting):
        return [score(image, text) for image, text in zip(images_NHWC, texts, strict=True)]


@contextlib.contextmanager
def _palette(setting: Setting) -> Iterator[None]:
    if not setting.recoloured:
        yield
        return
    from experiments.pocket_lora import palette

    with palette(scoring=True):
        yield


def _studio(setting: Setting, folder: Path) -> Any:
    import torch

    from secondcast.commands.shell.resolve import POCKET, resolve_teacher
    from secondcast.evaluation.sampling import Generator
    from secondcast.models.teacher.folder import BUILD_PARTS

    where = POCKET if setting.backbone == "pocket" else str(folder / "lora" / "teacher")
    return Generator.open(
        resolve_teacher(where, BUILD_PARTS),
        resolution=None,
        steps=setting.steps,
        guidance=setting.guidance,
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        text_length=setting.text_length,
    )


@remembered
def _encoder(who: str, folder: Path) -> Any:
    import torch

    from secondcast.commands.shell.resolve import POCKET, resolve_teacher
    from secondcast.models.student.folder import checkpoints
    from secondcast.models.student.student import load_student
    from secondcast.models.teacher.folder import BUILD_PARTS
    from secondcast.models.teacher.text_encoder import TeacherTextEncoder

    if who == TEACHER:
        teacher = resolve_teacher(POCKET, BUILD_PARTS)
        return TeacherTextEncoder.load(teacher, dtype=torch.float32, device=torch.device("cpu")).encode
    student = load_student(checkpoints(folder / "runs" / who / "run")[-1] / "student")
    return lambda ids_BT: student(ids_BT)[0]


def _embed(who: str, text_length: int, folder: Path) -> Any:
    """An Embed that reads texts at any length: a student's own is refused elsewhere, and is what is asked here."""
    from secondcast.evaluation.sampling import OwnTokensEmbed

    encode = _encoder(who, folder)
    return OwnTokensEmbed(embed=encode, token_ids=lambda texts: _token_ids(texts, text_length))


def _token_ids(texts: Sequence[str], text_length: int) -> Any:
    from secondcast.models.families.flux import FLUX
    from secondcast.pocket import TEACHER_FOLDER

    return FLUX.tokenizer(TEACHER_FOLDER / "tokenizer_2").padded(texts, text_length)
