"""FLOPs of optimizer steps, counted from shapes: what is computed, and what is computed again."""

from collections.abc import Mapping
from fractions import Fraction

import torch

from secondcast.models.cost.transformer import backbone_cost
from secondcast.models.memory.meta_run import count_flops
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.student.student import Student
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.loss_kinds import LOSSES
from secondcast.trainer.stage import Stage

# Forward, and twice as much for the gradients of weights and of activations.
_TRAINED = 3


@torch.no_grad()
def student_forward_flops(student: Student) -> float:
    """FLOPs of a student's forward pass of one text of its length; it is run once."""
    # Not on the meta device: most encoders of transformers look at the values of their mask.
    token_ids_BT = torch.zeros(1, student.config.text_length, dtype=torch.int64, device=student.device)
    return count_flops(lambda: student(token_ids_BT)).total


def step_flops(
    stage: Stage,
    memory: MemoryOptions,
    caches: Mapping[str, tuple[Manifest, int]],
    *,
    student_flops: float,
    text_length: int,
) -> float:
    """An optimizer step of a stage, of all processes together, over its caches by their shares.

    caches: by name, with the number of trajectories that are trained on. student_flops: of a forward pass of one text;
    text_length: of the student. The modulation linears count also where a table stands for them: of FLUX.1-dev 0.04 %
    of a forward pass.
    """
    texts = _TRAINED * student_flops * stage.batch_size
    if stage.replays:
        of_row = _mean_of_row(stage, memory, caches, text_length)
        return stage.batch_size * of_row + texts / stage.timesteps_per_sample
    if LOSSES[stage.loss].backbone == "text projection":
        return texts + stage.batch_size * _context_flops(caches, text_length)
    return texts


def _mean_of_row(
    stage: Stage, memory: MemoryOptions, caches: Mapping[str, tuple[Manifest, int]], text_length: int
) -> float:
    names = list(stage.caches or caches)
    shares = {name: stage.share_of(name, caches[name][1]) for name in names}
    whole = sum(shares.values(), start=Fraction(0))
    return sum(
        float(share / whole) * backbone_cost(_at_length(caches[name][0], text_length)).training_flops(memory)
        for name, share in shares.items()
    )


def _at_length(manifest: Manifest, text_length: int) -> Manifest:
    # A student with its own tokenizer may read fewer tokens than the teacher did.
    return manifest.model_copy(update={"teacher": manifest.teacher.model_copy(update={"text_length": text_length})})


def _context_flops(caches: Mapping[str, tuple[Manifest, int]], text_length: int) -> float:
    teacher = next(iter(caches.values()))[0].teacher
    inner = int(teacher.backbone_config["attention_head_dim"]) * int(teacher.backbone_config["num_attention_heads"])
    # The linear on the student's and on the teacher's embedding, and the gradient towards the student's.
    return 3 * 2.0 * text_length * teacher.text_width * inner
