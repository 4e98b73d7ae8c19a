"""The arms of `python -m experiments.pocket_roads`: start, loss and data of a student, and what they cost of FLUX."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.training.arms import training_flags

# Rows of a step, on the pocket and in the FLOPs of FLUX.
BATCH_SIZE = 20
STUDENT = "pocket-base"
# Prompts with trajectories, and with text alone; fewer are the first of more.
RECORDED = 1024
TEXT = (1024, 6144, 20480)
# Initial student, loss, prompts, steps at --scale 1, learning rate; the first ones answer most.
ROADS = (
    ("teacher", "context", TEXT[-1], 640, 1e-3),
    ("random", "context", TEXT[-1], 640, 3e-3),
    ("teacher", "context", 1024, 320, 1e-3),
    ("teacher", "depth", RECORDED, 80, 1e-3),
    ("teacher", "vision", RECORDED, 80, 1e-3),
    ("random", "depth", RECORDED, 80, 3e-3),
    ("random", "vision", RECORDED, 80, 1e-3),
    ("teacher", "vision", RECORDED, 80, 2e-4),
    ("teacher", "context", 6144, 320, 1e-3),
)
# Loss, prompts, steps, learning rate.
LATE_ROADS = (("vision", RECORDED, 80, 1e-4), ("context", TEXT[-1], 80, 3e-4), ("depth", RECORDED, 80, 3e-4))
# Steps between two checkpoints, at --scale 1.
EVERY = {"context": 40, "depth": 20, "vision": 20}
# The average of the weights takes the place of a rate that falls: each checkpoint is nearly worth a run of its length.
EMA_DECAY = 0.98
CONTEXT_LOSS_WEIGHT = 0.1
# Encoders by width, layers, heads, units, with heads of 16. The projection is not counted: it has 70,000 parameters.
SIZES: Mapping[str, tuple[int, int, int, int]] = {"10k": (16, 1, 1, 16), "25k": (32, 1, 2, 32)}
# The smaller one had not come to rest after 1,920.
SIZE_STEPS, SIZE_EVERY = {"10k": 3840, "25k": 1920}, 240
SIZE_RATE = 1e-2
# FLUX.1-dev at 512 px with T5-base, calculated: TFLOP of a sample of a vision step, its ratio to other steps, and of a
# prompt, recorded (sampled and encoded) or encoded alone.
VISION_TFLOP = 31.4
RATIOS = {"context": 580.0, "depth": 39.0, "vision": 1.0}
ENCODED_TFLOP = 0.71
RECORDED_TFLOP = 301.0 + ENCODED_TFLOP
# `init-student` encodes these.
INITIAL_PROMPTS = 2000


@dataclass(frozen=True, kw_only=True)
class Road:
    """One student trained one way, with checkpoints on the way that are all measured.

    initial: "random", "teacher", "late" (where the context road of most prompts ends), or of SIZES.
    prompts: how many train with `loss`; their trajectories too unless the loss is context.
    mixed: whether each vision step has a context loss on the text prompts beside it.
    every: steps between two checkpoints.
    """

    table: str
    initial: str
    loss: str
    prompts: int
    steps: int
    every: int
    learning_rate: float
    mixed: bool = False

    @property
    def name(self) -> str:
        """A folder's name."""
        return "-".join(
            (self.table, self.initial, self.loss + "-mixed" * self.mixed, str(self.prompts), f"{self.learning_rate:g}")
        )

    @property
    def caches(self) -> list[str]:
        """Names of caches."""
        return [f"text-{self.prompts}" if self.loss == "context" else f"recorded-{self.prompts}"] + (
            [f"text-{TEXT[-1]}"] if self.mixed else []
        )

    def flags(self, student: str, seed: int) -> dict[str, Any]:
        """What `secondcast train` is given, by the names of TrainFlags."""
        flags = training_flags(student, self.loss, self.steps, self.learning_rate, seed)
        flags |= {"batch_size": BATCH_SIZE, "lr_schedule": "constant", "lr_warmup_steps": 20, "ema_decay": EMA_DECAY}
        flags |= {"checkpoint_every": self.every, "keep_checkpoints": 1000}
        return flags | ({"context_loss_weight": CONTEXT_LOSS_WEIGHT} if self.mixed else {})

    def measured(self) -> list[int]:
        """The numbers of steps on a geometric series whose checkpoints are measured."""
        found = [self.steps]
        while found[-1] % 2 == 0 and found[-1] // 2 % self.every == 0:
            found.append(found[-1] // 2)
        return found[::-1]

    def training_tflop(self, steps: int) -> float:
        """Of so many steps, in FLUX's proportions."""
        each = VISION_TFLOP * (1 / RATIOS[self.loss] + self.mixed / RATIOS["context"])
        return steps * BATCH_SIZE * each

    def data_tflop(self) -> float:
        """Of the prompts, and of the statistics of an initial student that is made of the teacher."""
        made = 0.0 if self.initial in ("random", *SIZES) else INITIAL_PROMPTS * ENCODED_TFLOP
        each = ENCODED_TFLOP if self.loss == "context" else RECORDED_TFLOP
        return made + self.prompts * each + (TEXT[-1] * ENCODED_TFLOP if self.mixed else 0.0)


def roads(scale: float) -> list[Road]:
    """Both initial students by each loss."""
    return [_road(scale, "roads", *given) for given in ROADS]


def sizes(scale: float) -> list[Road]:
    """Small random students by the context loss on all prompts."""
    return [_road(scale, "sizes", size, "context", TEXT[-1], SIZE_STEPS[size], SIZE_RATE, SIZE_EVERY) for size in SIZES]


def late(scale: float) -> list[Road]:
    """What can follow the context loss from the teacher's encoder."""
    found = [_road(scale, "late", "late", *given, EVERY["vision"]) for given in LATE_ROADS]
    return [*found, replace(found[0], mixed=True)]


def start_of_late(scale: float) -> Road:
    """The road whose last student is the initial one of `late`."""
    return roads(scale)[0]


def _road(
    scale: float, table: str, initial: str, loss: str, prompts: int, steps: int, rate: float, every: int | None = None
) -> Road:
    steps, every = (max(1, round(scale * number)) for number in (steps, every or EVERY[loss]))
    common: dict[str, Any] = {"table": table, "initial": initial, "loss": loss, "prompts": prompts}
    return Road(**common, steps=steps, every=every, learning_rate=rate)
