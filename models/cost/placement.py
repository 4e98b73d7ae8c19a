"""Where the weights of a transformer go while it samples, so that a call fits into GPU memory.

The memory is calculated, not measured. Only exact placements are tried: all weights on the GPU; without the modulation
weights, a quarter of FLUX; the blocks streamed from the host, as few of them as possible.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter

from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.gpu_memory import GpuMemory, WeightBytes, held_weights, modulation_rows, table_rows
from secondcast.models.cost.network_costs import BackboneCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import size_text
from secondcast.storage_schemas.schema.fields import DTYPES
from secondcast.storage_schemas.schema.manifest import Manifest

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """What sampling needs on the GPU.

    beside_bytes: networks other than the transformer.
    row_bytes: of a row of a batch, besides the activations of the transformer.
    rows_per_call: of the transformer for a row of a batch: 2 with those of the negative prompt.
    decoding_bytes: activations of the VAE in one call, when the transformer has none.
    table_rows: rows of the modulation table; None if none is possible.
    """

    backbone: BackboneCost
    dtype_bytes: int
    batch_size: int
    beside_bytes: int = 0
    row_bytes: int = 0
    rows_per_call: int = 1
    decoding_bytes: int = 0
    table_rows: int | None = None

    def weights(self, options: MemoryOptions) -> WeightBytes:
        """Where the weights of the transformer are with these options."""
        return held_weights(self.backbone, options, dtype_bytes=self.dtype_bytes, table_rows=self.table_rows)

    def memory(self, options: MemoryOptions) -> GpuMemory:
        """GPU memory with these options."""
        activations = max(self.batch_size * self.rows_per_call * self.backbone.forward_peak_bytes, self.decoding_bytes)
        return GpuMemory(
            weights_bytes=self.weights(options).device_bytes + self.beside_bytes,
            student_bytes=0,
            sample_bytes=self.row_bytes + -(-activations // self.batch_size),
            batch_size=self.batch_size,
        )


def sample_stage_cost(manifest: Manifest, batch_size: int) -> SamplingCost:
    """What the sample stage of a build needs on the GPU."""
    sampling, itemsize = manifest.sampling, DTYPES[manifest.sampling.dtype].itemsize
    latent_bytes = sampling.image_tokens * sampling.channels * itemsize
    return SamplingCost(
        backbone=backbone_cost(CallShapes.of(manifest)),
        dtype_bytes=itemsize,
        batch_size=batch_size,
        rows_per_call=sampling.rows_per_call,
        # A batch is sampled while the one before is copied to the host.
        row_bytes=2 * (2 * sampling.steps + 1) * latent_bytes,
        table_rows=table_rows(manifest),
    )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Options that fit, and the memory that they need on the GPU and pinned on the host."""

    options: MemoryOptions
    memory: GpuMemory
    pinned_bytes: int

    @property
    def flags(self) -> str:
        """The chosen options and the memory that they need."""
        streamed = "" if self.options.gpu_blocks is None else f" --gpu-blocks {self.options.gpu_blocks}"
        pinned = f", {size_text(self.pinned_bytes)} of pinned host memory" if self.pinned_bytes else ""
        memory = self.memory
        return (
            f"--modulation {self.options.modulation}{streamed}, {size_text(memory.total_bytes)} by calculation "
            f"(weights {size_text(memory.weights_bytes)}, a batch of {memory.batch_size} "
            f"{size_text(memory.activations_bytes)}){pinned}"
        )

    def text(self, memory_bytes: float) -> str:
        """One line for the progress display."""
        exact = "; the weights stay exact" if self.options.quantize == "none" else ""
        return f"to fit into {size_text(int(memory_bytes))}: {self.flags}{exact}"


def place(
    cost: SamplingCost,
    asked: MemoryOptions,
    *,
    memory_bytes: float,
    host_bytes: float | None,
    held: Collection[str] = (),
) -> Placement:
    """The first placement that fits; SettingsError with the smallest one if none does.

    asked: options that stay as they are if they fit.
    memory_bytes: of the GPU; host_bytes: free memory of the host, None if unknown.
    held: options of WeightPlacement that the user gave: they do not change.
    """
    smallest: GpuMemory | None = None
    least_pinned: int | None = None
    for options in _placements(cost, asked, held):
        memory, pinned = cost.memory(options), cost.weights(options).pinned_bytes
        smallest = min(smallest or memory, memory, key=attrgetter("needed_bytes"))
        if memory.needed_bytes > memory_bytes:
            continue
        if host_bytes is None or pinned <= host_bytes:
            return Placement(options=options, memory=memory, pinned_bytes=pinned)
        least_pinned = min(least_pinned or pinned, pinned)
    if least_pinned is not None and host_bytes is not None:
        raise SettingsError(
            f"streamed blocks need {least_pinned / _GIB:.1f} GiB of pinned host memory to fit into "
            f"{memory_bytes / _GIB:.1f} GiB of GPU memory, {host_bytes / _GIB:.1f} GiB are free: give a smaller "
            f"--batch-size, a larger limit, or a machine with more memory"
        )
    assert smallest is not None
    raise SettingsError(
        f"nothing fits into {memory_bytes / _GIB:.1f} GiB: a batch of {cost.batch_size} needs "
        f"{smallest.needed_bytes / _GIB:.1f} GiB or more, {smallest.weights_bytes / _GIB:.1f} of it for weights: "
        f"give a smaller --batch-size, or a larger GPU"
    )


def _placements(cost: SamplingCost, asked: MemoryOptions, held: Collection[str]) -> Iterator[MemoryOptions]:
    if asked.modulation == "auto":
        rows = modulation_rows(cost.backbone, asked, cost.table_rows)
        asked = asked.model_copy(update={"modulation": "gpu" if rows is None else "precomputed"})
    yield asked
    if "modulation" not in held and asked.modulation == "gpu" and cost.table_rows is not None:
        asked = asked.model_copy(update={"modulation": "precomputed"})
        yield asked
    if "gpu_blocks" not in held and asked.quantize == "none":
        for resident in range(cost.backbone.blocks - 1, -1, -1):
            yield asked.model_copy(update={"gpu_blocks": resident})
