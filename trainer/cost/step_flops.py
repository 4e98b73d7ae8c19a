"""FLOPs of optimizer steps, counted from shapes: what is computed, and what is computed again."""

from collections.abc import Mapping
from fractions import Fraction

from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.schema.manifest import Manifest, Teacher
from secondcast.trainer.loss_kinds import LOSSES
from secondcast.trainer.stage import Stage

# Forward, and twice as much for the gradients of weights and of activations.
_TRAINED = 3


def step_flops(
    stage: Stage,
    memory: MemoryOptions,
    caches: Mapping[str, tuple[Manifest, int]],
    *,
    student_flops: float,
    text_length: int,
    loaded_blocks: int | None = None,
) -> float:
    """FLOPs of an optimizer step of a stage, of all processes together, over its caches by their shares.

    caches: by name, with the number of trajectories that are trained on.
    student_flops: of a forward pass of one text.
    text_length: of the student.
    loaded_blocks: number of the transformer's first blocks that the run loads; None: all.
    """
    row = 0.0
    match LOSSES[stage.loss].backbone:
        case "all" | "first blocks":
            row = _replay_flops(stage, memory, caches, text_length, loaded_blocks)
        case "text projection":
            row = _projection_flops(next(iter(caches.values()))[0].teacher, text_length)
    flops = row + _TRAINED * student_flops / stage.timesteps_per_sample
    if stage.context_loss_weight:
        flops += _projection_flops(next(iter(caches.values()))[0].teacher, text_length) + _TRAINED * student_flops
    return stage.batch_size * flops


def _replay_flops(
    stage: Stage,
    memory: MemoryOptions,
    caches: Mapping[str, tuple[Manifest, int]],
    text_length: int,
    loaded_blocks: int | None,
) -> float:
    """FLOPs of the transformer for a row of the batch: the mean over the stage's caches.

    The modulation linears count also where a table replaces them: of FLUX.1-dev 0.04 % of a forward pass.
    """
    names = [name for name in caches if stage.trains_on(name, is_text=caches[name][0].is_text)]
    shares = {name: stage.share_of(name, caches[name][1]) for name in names}
    whole = sum(shares.values(), start=Fraction(0))

    def flops(name: str) -> float:
        backbone = backbone_cost(CallShapes.of(_at_length(caches[name][0], text_length)))
        if stage.blocks is None:
            return backbone.training_flops(memory)
        loaded = backbone if loaded_blocks is None else backbone.first(loaded_blocks)
        # The teacher's embedding too, without gradients.
        return loaded.first(stage.blocks).forward_flops + loaded.training_flops(memory, stage.blocks)

    return sum(float(share / whole) * flops(name) for name, share in shares.items())


def _at_length(manifest: Manifest, text_length: int) -> Manifest:
    # A student with its own tokenizer may read fewer tokens than the teacher did.
    return manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"text_length": text_length})})


def _projection_flops(teacher: Teacher, text_length: int) -> float:
    """FLOPs of the text projection for a row of the batch."""
    inner = int(teacher.backbone_config["attention_head_dim"]) * int(teacher.backbone_config["num_attention_heads"])
    # The linear on the student's and on the teacher's embedding, and the gradient towards the student's.
    return 3 * 2.0 * text_length * teacher.text_width * inner
