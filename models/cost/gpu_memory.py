"""GPU and host memory of the stages, calculated from costs, not measured on a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from secondcast.models.cost.network_costs import BackboneCost, BlockCost, TextEncoderCost
from secondcast.models.memory.blocks import SLOTS, streamed_blocks
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import PLAIN, MemoryOptions, takes_host
from secondcast.storage_schemas.schema.manifest import Manifest

# CUDA context, library workspaces, allocator fragmentation: assumed.
CUDA_BYTES = 2**30
# Python with torch, diffusers and transformers imported: assumed.
PROCESS_BYTES = 2 * 2**30
# What stays free on a GPU beside that: other programs, kernels' workspaces, what is not counted. Assumed.
_MARGIN_BYTES, _MARGIN = 2**29, 0.04
# fp32 weights, AdamW's two moments, and the bf16 copies that autocast keeps within a step.
_STUDENT_BYTES_PER_PARAMETER = 4 + 8 + 2
_GRADIENT_BYTES_PER_PARAMETER = _AVERAGE_BYTES_PER_PARAMETER = 4
# torchao: one scale per row of thousands of weights. bitsandbytes: a float32 scale per 64 weights.
_BYTES_PER_WEIGHT = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}


def with_margin(total_bytes: float) -> float:
    """The smallest GPU memory in which total_bytes leave a margin."""
    return (total_bytes + _MARGIN_BYTES) / (1 - _MARGIN)


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on the GPU in one stage: the constant part, and the part per sample of the batch."""

    weights_bytes: int
    student_bytes: int
    sample_bytes: int
    batch_size: int

    @property
    def activations_bytes(self) -> int:
        """Activations of the whole batch."""
        return self.sample_bytes * self.batch_size

    @property
    def cuda_bytes(self) -> int:
        """Memory of CUDA itself."""
        return CUDA_BYTES

    @property
    def total_bytes(self) -> int:
        """The sum, including memory of CUDA itself."""
        return self.weights_bytes + self.student_bytes + self.activations_bytes + CUDA_BYTES

    @property
    def needed_bytes(self) -> float:
        """Memory that a GPU must have: the total, and a margin of 0.5 GiB and 4 % of its memory."""
        return with_margin(self.total_bytes)

    def largest_batch(self, memory_bytes: float) -> int:
        """The largest batch that fits into a GPU with memory_bytes; 0 if none does."""
        free = (1 - _MARGIN) * memory_bytes - _MARGIN_BYTES - (self.total_bytes - self.activations_bytes)
        return max(0, int(free // max(1, self.sample_bytes)))


def text_stage_memory(
    cost: TextEncoderCost, *, dtype_bytes: int, batch_size: int, beside_parameters: int = 0
) -> GpuMemory:
    """The text stage of a build.

    cost: of T5. beside_parameters: of the other text encoders, whose activations are smaller than T5's.
    """
    weights = (cost.parameters + beside_parameters) * dtype_bytes
    return GpuMemory(
        weights_bytes=weights, student_bytes=0, sample_bytes=cost.forward_peak_bytes, batch_size=batch_size
    )


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a frozen backbone: on the device (with weights unpacked at one time), and on the host.

    streamed_bytes: of each streamed block by its index, in pinned memory.
    """

    device_bytes: int = 0
    streamed_bytes: Mapping[int, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def pinned_bytes(self) -> int:
        """Pinned host memory."""
        return sum(self.streamed_bytes.values())


def held_weights(
    backbone: BackboneCost,
    options: MemoryOptions,
    *,
    dtype_bytes: int,
    table_rows: int | None,
    gpu_bytes: float | None = None,
) -> WeightBytes:
    """Weights of a backbone with these options.

    table_rows: rows of its modulation table (see table_rows); None if no table is possible.
    gpu_bytes: total memory of the GPU; None without a GPU (see takes_host).
    """
    whole_bytes = backbone.parameters * dtype_bytes
    varies = table_rows is None and backbone.modulation_parameters > 0
    on_host = takes_host(options, pooled_varies=varies, weights_bytes=whole_bytes, gpu_bytes=gpu_bytes)
    rows = 0 if on_host else modulation_rows(backbone, options, table_rows)

    def modulation_bytes(parameters: int, width: int) -> int:
        return dtype_bytes * (parameters if rows is None else rows * width)

    def block_bytes(kind: BlockCost) -> int:
        linears = kind.parameters - kind.modulation_parameters
        held = linears * _BYTES_PER_WEIGHT.get(options.quantize, dtype_bytes)
        return int(held) + modulation_bytes(kind.modulation_parameters, kind.modulation_width)

    kinds = [backbone.kind_of(block) for block in range(backbone.blocks)]
    last_parameters = backbone.modulation_parameters - sum(kind.modulation_parameters for kind in kinds)
    last_width = backbone.modulation_width - sum(kind.modulation_width for kind in kinds)
    outer = backbone.parameters - sum(kind.parameters for kind in kinds) - last_parameters
    if rows is not None:
        outer -= backbone.conditioning_parameters
    resident = backbone.blocks if options.gpu_blocks is None else min(options.gpu_blocks, backbone.blocks)
    streamed = {block: block_bytes(kinds[block]) for block in streamed_blocks(resident, backbone.blocks)}
    on_device = sum(block_bytes(kind) for kind in kinds) - sum(streamed.values())
    ring = max(streamed.values(), default=0) * min(SLOTS, len(streamed))
    outer_bytes = dtype_bytes * outer + modulation_bytes(last_parameters, last_width)
    unpacked = _unpacked_weights(backbone, options) * dtype_bytes
    made = (backbone.modulation_parameters + backbone.conditioning_parameters) * dtype_bytes
    return WeightBytes(
        device_bytes=outer_bytes + on_device + ring + unpacked,
        streamed_bytes=streamed,
        host_bytes=made if on_host else 0,
    )


def modulation_rows(backbone: BackboneCost, options: MemoryOptions, table_rows: int | None) -> int | None:
    """Rows of the modulation table of a backbone on the device; None if it keeps the modulation weights."""
    if options.modulation == "gpu" or table_rows is None or not backbone.modulation_parameters:
        return None
    smaller = table_rows * backbone.modulation_width <= backbone.modulation_parameters
    return table_rows if options.modulation == "precomputed" or smaller else None


def training_memory(
    backbone: BackboneCost | None,
    student: TextEncoderCost,
    *,
    options: MemoryOptions = PLAIN,
    dtype_bytes: int,
    batch_size: int,
    table_rows: int | None = None,
    timesteps_per_sample: int = 1,
    gpu_bytes: float | None = None,
    averaged: bool = False,
    accumulates: bool = False,
    depth: int | None = None,
) -> GpuMemory:
    """Training: frozen backbone (None where no stage replays), student in fp32 with AdamW, activations of both.

    options: memory options of the backbone.
    batch_size: rows in a forward pass.
    timesteps_per_sample: rows that share one forward pass of the student.
    table_rows, gpu_bytes: see held_weights.
    averaged: whether an EMA of the student's weights is kept.
    accumulates: whether gradients of an earlier part of the batch are there when activations are at their peak.
    depth: number of first blocks whose streams are compared; None: all blocks are run, and predictions compared.
    """
    weights = sample = 0
    per_parameter = _STUDENT_BYTES_PER_PARAMETER + (_AVERAGE_BYTES_PER_PARAMETER if averaged else 0)
    if backbone is not None:
        held = held_weights(backbone, options, dtype_bytes=dtype_bytes, table_rows=table_rows, gpu_bytes=gpu_bytes)
        weights, sample = held.device_bytes, backbone.training_bytes(options, depth)
        if held.host_bytes:
            sample += dtype_bytes * backbone.modulation_width
    sample += -(-student.saved_bytes // timesteps_per_sample)
    # Gradients arise while activations are freed: in one part of a batch the two are not there together.
    gradients = _GRADIENT_BYTES_PER_PARAMETER * student.parameters
    if not accumulates:
        gradients = max(0, gradients - batch_size * sample)
    return GpuMemory(
        weights_bytes=weights,
        student_bytes=student.parameters * per_parameter + gradients,
        sample_bytes=sample,
        batch_size=batch_size,
    )


def table_rows(*manifests: Manifest) -> int | None:
    """Rows of the modulation table for these caches; None if no table is possible (CLIP's pooled vectors, or none)."""
    conditions = recorded_conditions(manifests, batch_rows=1)
    return len(conditions.pairs) if conditions is not None else None


def _unpacked_weights(backbone: BackboneCost, options: MemoryOptions) -> int:
    """Maximum number of quantized weights unpacked at once: for torchao a block's, until its backward pass."""
    if options.quantize == "none":
        return 0
    if options.quantize == "nf4":
        return backbone.largest_linear
    return max(kind.parameters - kind.modulation_parameters for kind in backbone.kinds if kind.count)


def build_host_bytes(*, weights_bytes: int, shard_bytes: int, in_flight: int) -> int:
    """Peak host memory of a build: weights pass through it once; then shards are sampled, queued and verified.

    The current shard needs its batches and their concatenation. The shard being written needs its arrays, encoded and
    decoded bytes in the encoding process, and its encoded bytes in this process.
    """
    return PROCESS_BYTES + max(weights_bytes, (2 + in_flight + 4) * shard_bytes)


def training_host_bytes(*, pool_bytes: int, pinned_bytes: int, weights_bytes: int = 0) -> int:
    """Peak host memory of training: caches of trajectories and embeddings, pinned memory, weights kept on the host.

    The held-out data has caches of its own. Weights that are loaded to the device are memory-mapped files, which the
    system can reclaim (docs/small-gpus.md): they do not count.
    """
    return PROCESS_BYTES + 4 * pool_bytes + pinned_bytes + weights_bytes
