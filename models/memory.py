"""GPU and host memory of the stages, calculated from costs; nothing here was measured on a GPU."""

from dataclasses import dataclass

from models.cost import BackboneCost
from models.modulation_table import recorded_conditions
from models.text_cost import TextEncoderCost
from storage_schemas.manifest import Manifest

# CUDA context, libraries' workspaces, fragmentation of the allocator: assumed.
CUDA_BYTES = 2**30
# Python with torch, diffusers and transformers imported: assumed.
PROCESS_BYTES = 2 * 2**30
# fp32 weights, gradients and AdamW's two moments, and the bf16 copies that autocast keeps within a step.
_STUDENT_BYTES_PER_PARAMETER = 4 + 4 + 8 + 2


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on the GPU in one stage: what does not grow with the batch, and what each sample adds."""

    weights_bytes: int
    student_bytes: int
    sample_bytes: int
    batch_size: int

    @property
    def activations_bytes(self) -> int:
        """Of the whole batch."""
        return self.sample_bytes * self.batch_size

    @property
    def total_bytes(self) -> int:
        """All of it, CUDA's own among it."""
        return self.weights_bytes + self.student_bytes + self.activations_bytes + CUDA_BYTES

    def largest_batch(self, memory_bytes: float) -> int:
        """The largest batch that fits; 0 if none does."""
        free = memory_bytes - (self.total_bytes - self.activations_bytes)
        return max(0, int(free // max(1, self.sample_bytes)))


def text_stage_memory(cost: TextEncoderCost, *, dtype_bytes: int, batch_size: int) -> GpuMemory:
    """The text stage of a build: T5 alone."""
    weights = cost.parameters * dtype_bytes
    return GpuMemory(
        weights_bytes=weights, student_bytes=0, sample_bytes=cost.forward_peak_bytes, batch_size=batch_size
    )


def sample_stage_memory(cost: BackboneCost, *, dtype_bytes: int, batch_size: int, walk_bytes: int) -> GpuMemory:
    """The sample stage: the backbone, and latents and predictions of a batch of walks (`walk_bytes` of one).

    They are kept until the walk ends, once more while they are put together, and as they are copied to the host beside
    the next walk.
    """
    return GpuMemory(
        weights_bytes=cost.parameters * dtype_bytes,
        student_bytes=0,
        sample_bytes=cost.forward_peak_bytes + 3 * walk_bytes,
        batch_size=batch_size,
    )


def training_memory(
    backbone: BackboneCost | None,
    student: TextEncoderCost,
    *,
    dtype_bytes: int,
    batch_size: int,
    checkpointing: int = 0,
    table_rows: int | None = None,
    share: int = 1,
) -> GpuMemory:
    """Training: frozen backbone (None in a warm-up alone), student in fp32 with AdamW, activations of both.

    batch_size: rows that go through the networks at once; share: rows that share one pass of the student.
    checkpointing: 0 none, n every n-th block of the backbone. table_rows: of a modulation table (see table_rows);
    None: there is none.
    """
    weights = sample = 0
    if backbone is not None:
        weights = backbone.weights_bytes(dtype_bytes=dtype_bytes, table_rows=table_rows)
        sample = backbone.training_bytes(checkpointing=checkpointing)
    return GpuMemory(
        weights_bytes=weights,
        student_bytes=student.parameters * _STUDENT_BYTES_PER_PARAMETER,
        sample_bytes=sample + -(-student.saved_bytes // share),
        batch_size=batch_size,
    )


def table_rows(manifest: Manifest) -> int | None:
    """Rows of the modulation table with which such a cache is trained on; None where it has none (pooled of CLIP)."""
    conditions = recorded_conditions([manifest], batch_rows=1)
    return len(conditions.pairs) if conditions is not None else None


def fitting_checkpoints(
    backbone: BackboneCost,
    student: TextEncoderCost,
    *,
    dtype_bytes: int,
    batch_size: int,
    table_rows: int | None,
    memory_bytes: float,
) -> int | None:
    """The value of --checkpoint-blocks that computes the fewest blocks again and fits; None if none fits."""
    blocks = backbone.double_blocks.count + backbone.single_blocks.count
    for every in (0, *range(blocks, 0, -1)):
        memory = training_memory(
            backbone, student, dtype_bytes=dtype_bytes, batch_size=batch_size, checkpointing=every,
            table_rows=table_rows,
        )  # fmt: skip
        if memory.total_bytes <= memory_bytes:
            return every
    return None


def build_host_bytes(*, weights_bytes: int, shard_bytes: int, in_flight: int) -> int:
    """Peak of host memory of a build: weights pass through it once; then shards are made, wait and are checked.

    Of the shard that is made there are its batches and their concatenation; of the one that is written, in the process
    that encodes, its arrays, encoded and decoded bytes, and the encoded ones here again.
    """
    return PROCESS_BYTES + max(weights_bytes, (2 + in_flight + 4) * shard_bytes)


def training_host_bytes(*, weights_bytes: int, pool_bytes: int, pinned_bytes: int) -> int:
    """Peak of host memory of training: weights once while loading; pools of trajectories and of embeddings.

    The feed of the held-out prompts has pools of its own.
    """
    return PROCESS_BYTES + max(weights_bytes, 4 * pool_bytes + pinned_bytes)
