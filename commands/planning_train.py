"""What `understudy plan train` prints, as plain JSON types: stages, costs, memory. Keys end in their unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from commands.planning import DTYPE_BYTES, hours_of, memory_facts
from storage_schemas.layout import Layout
from storage_schemas.sizes import cache_sizes

if TYPE_CHECKING:
    from models.cost import BackboneCost
    from models.memory import GpuMemory
    from models.text_cost import TextEncoderCost
    from storage_schemas.manifest import Manifest
    from trainer.settings import TrainSettings
    from trainer.stage import Stage

# Paper, section 4: 320 thousand iterations of 32, one step of a trajectory each.
PAPER_STEPS, PAPER_BATCH = 320_000, 32
AS_ASKED, EVERY_BLOCK = "as_asked", "checkpoint_blocks_1"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run is made of: its caches by name, the backbone at each one's size, the student."""

    manifests: "Mapping[str, Manifest]"
    backbones: "Mapping[str, BackboneCost]"
    student: "TextEncoderCost"

    def names(self, stage: "Stage") -> list[str]:
        """The caches that a stage takes."""
        return list(stage.caches or self.manifests)

    def step_flops(self, stage: "Stage", *, checkpointing: int) -> float:
        """An optimizer step of a stage, over its caches by their shares."""
        # Forward, and twice as much for the gradients of weights and of activations.
        texts = 3 * self.student.forward_flops * stage.batch_size
        if stage.loss == "vision":
            rows = stage.batch_size * self._mean_flops(stage, checkpointing=checkpointing)
            return rows + texts / stage.steps_per_trajectory
        return texts + (stage.batch_size * self._context_flops() if stage.loss == "context" else 0)

    def _mean_flops(self, stage: "Stage", *, checkpointing: int) -> float:
        shares = {name: stage.share_of(name, self._trajectories(name)) for name in self.names(stage)}
        whole = sum(shares.values(), start=Fraction(0))
        return sum(
            float(share / whole) * self.backbones[name].training_flops(checkpointing=checkpointing)
            for name, share in shares.items()
        )

    def _trajectories(self, name: str) -> int:
        return len(Layout(self.manifests[name].prompts.generations))

    def _context_flops(self) -> float:
        teacher = next(iter(self.manifests.values())).teacher
        config = teacher.backbone_config
        inner = int(config["attention_head_dim"]) * int(config["num_attention_heads"])
        # The linear on the student's and on the teacher's embedding, and the gradient towards the student's.
        return 3 * 2.0 * teacher.text_length * teacher.text_width * inner

    def memory(self, settings: "TrainSettings", *, checkpointing: int) -> "GpuMemory":
        """Of the stage and the cache that need most: the weights are there throughout."""
        from models.memory import training_memory

        first = next(iter(self.manifests.values()))
        found = []
        for stage in settings.stages:
            vision = stage.loss == "vision"
            for name in self.names(stage) if vision else self.names(stage)[:1]:
                used = self.backbones[name] if vision else None
                found.append(
                    training_memory(
                        used, self.student, dtype_bytes=DTYPE_BYTES[first.sampling.dtype],
                        batch_size=stage.batch_size // stage.accumulate, checkpointing=checkpointing,
                        share=stage.steps_per_trajectory, table_rows=self.table_rows(settings, name),
                    )
                )  # fmt: skip
        return max(found, key=lambda memory: memory.total_bytes)

    def table_rows(self, settings: "TrainSettings", name: str) -> int | None:
        """Rows of the modulation table that a run on a cache has; None for live weights."""
        from models.memory import table_rows

        return None if settings.modulation == "live" else table_rows(self.manifests[name])


def costs_of(manifests: "Mapping[str, Manifest]", student_source: str) -> Costs:
    """The costs of a run on (planned) caches."""
    from models.cost import backbone_cost
    from models.text_cost import student_cost

    backbones = {name: backbone_cost(manifest) for name, manifest in manifests.items()}
    student = student_cost(student_source, next(iter(manifests.values())))
    return Costs(manifests=manifests, backbones=backbones, student=student)


def train_facts(settings: "TrainSettings", costs: Costs, *, rate_flops: float | None) -> dict[str, Any]:
    """Memory, hours and read rate of a run on (planned) caches, beside the paper's recipe."""
    from models.memory import training_host_bytes
    from trainer.feed import AHEAD_PART, POOL_BYTES

    weights = next(iter(costs.backbones.values())).parameters if "vision" in settings.losses else 0
    dtype_bytes = DTYPE_BYTES[next(iter(costs.manifests.values())).sampling.dtype]
    return {
        "student": {"source": settings.student, "parameters": costs.student.parameters},
        "training": {
            "budget_hours": None if settings.budget_seconds is None else settings.budget_seconds / 3600,
            "checkpoint_every_steps": settings.checkpoint_every,
        },
        "ways": {name: _way(settings, costs, every, rate_flops) for name, every in _ways(settings).items()},
        "host_memory_bytes": training_host_bytes(
            weights_bytes=weights * dtype_bytes, pool_bytes=POOL_BYTES, pinned_bytes=POOL_BYTES // AHEAD_PART
        ),
    }


def _ways(settings: "TrainSettings") -> dict[str, int]:
    """Ways to train, and every how many blocks one is computed twice (0: none)."""
    asked = {AS_ASKED: settings.checkpoint_blocks}
    alone = "vision" not in settings.losses or settings.checkpoint_blocks == 1
    return asked if alone else asked | {EVERY_BLOCK: 1}


def fitting_flag(settings: "TrainSettings", costs: Costs, memory_bytes: float) -> str | None:
    """The --checkpoint-blocks that computes the fewest blocks twice and fits; None if none does."""
    blocks = next(iter(costs.backbones.values()))
    count = blocks.double_blocks.count + blocks.single_blocks.count
    for every in range(count, 0, -1):
        if costs.memory(settings, checkpointing=every).total_bytes <= memory_bytes:
            return f"--checkpoint-blocks {every}"
    return None


def _way(settings: "TrainSettings", costs: Costs, checkpointing: int, rate_flops: float | None) -> dict[str, Any]:
    stages = [_stage(settings, stage, costs, checkpointing, rate_flops) for stage in settings.stages]
    main = next((stage for stage in settings.stages if stage.loss == "vision"), settings.stages[-1])
    name = costs.names(main)[0]
    step = _step(main, costs, checkpointing)
    student = 3 * costs.student.forward_flops
    first = next(iter(costs.backbones.values()))
    paper = (first.training_flops(checkpointing=checkpointing) + student) * PAPER_BATCH * PAPER_STEPS
    return {
        "flop_per_sample": step / main.batch_size,
        "gpu_memory": memory_facts(costs.memory(settings, checkpointing=checkpointing)),
        "stages": stages,
        "hours": _sum([stage["hours"] for stage in stages]),
        "warmup_hours": _sum([stage["hours"] for stage in stages if stage["loss"] != "vision"], rate_flops),
        "vision_hours": _sum([stage["hours"] for stage in stages if stage["loss"] == "vision"], rate_flops),
        "seconds_per_step": None if rate_flops is None else step / rate_flops,
        "paper_recipe_hours": hours_of(paper, rate_flops, 1),
        **_reading(costs.manifests[name], main, rate_flops, step),
    }


def _step(stage: "Stage", costs: Costs, checkpointing: int) -> float:
    # What a step of the vision loss would take is told even where none is asked for.
    vision = stage if stage.loss == "vision" else stage.model_copy(update={"loss": "vision"})
    return costs.step_flops(vision, checkpointing=checkpointing)


def _stage(
    settings: "TrainSettings", stage: "Stage", costs: Costs, checkpointing: int, rate_flops: float | None
) -> dict[str, Any]:
    flop = costs.step_flops(stage, checkpointing=checkpointing)
    seconds = None if rate_flops is None else flop / rate_flops
    steps, hours = stage.steps, None
    if stage.budget_share is not None and settings.budget_seconds is not None:
        share_seconds = settings.budget_seconds * stage.budget_share
        hours = share_seconds / 3600
        steps = None if seconds is None else max(1, int(share_seconds / seconds))
    elif steps is not None and seconds is not None:
        hours = steps * seconds / 3600
    return {
        "name": stage.name,
        "loss": stage.loss,
        "caches": {name: costs.manifests[name].sampling.height for name in costs.names(stage)},
        "steps": steps,
        "budget_share": stage.budget_share,
        "batch_size": stage.batch_size,
        "accumulate": stage.accumulate,
        "steps_per_trajectory": stage.steps_per_trajectory,
        "flop_per_step": flop,
        "seconds_per_step": seconds,
        "hours": hours,
    }


def _sum(hours: list[float | None], rate_flops: float | None = 1.0) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known) if len(known) == len(hours) and rate_flops is not None else None


def _reading(manifest: "Manifest", stage: "Stage", rate_flops: float | None, flop: float) -> dict[str, Any]:
    """Bytes per second that a step uses (a latent and a prediction a row), and that are read where nothing is pooled.

    Rows that do not share the student's pass are of other trajectories; each of these is decoded from its first step.
    """
    sizes = {size.name: size for size in cache_sizes(manifest)}
    latent_bytes = sizes["final_latent"].row_bytes
    whole = [size for name, size in sizes.items() if name in ("velocity", "noise", "hidden_states", "final_latent")]
    stored = sum(size.stored_high_bytes for size in whole) / max(1, whole[0].rows)
    per_second = None if rate_flops is None else rate_flops / flop
    used, read = 2 * latent_bytes * stage.batch_size, stored * stage.batch_size / stage.steps_per_trajectory
    return {
        "used_bytes_per_step": used,
        "used_bytes_per_second": None if per_second is None else used * per_second,
        "read_bytes_per_step": read,
        "read_bytes_per_second": None if per_second is None else read * per_second,
    }
