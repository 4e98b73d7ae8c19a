"""Sizes and costs of a build, as plain JSON types, for `secondcast plan build`. Keys end in their unit."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.sizes import Size, cache_sizes

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.cost.gpu_memory import GpuMemory
    from secondcast.models.cost.network_costs import BackboneCost, TextEncoderCost
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Manifest

_GIB = 2**30
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def build_facts(
    manifest: "Manifest", teacher: "TeacherFolder", *, batch_size: int, rate_flops: float | None, gpus: int
) -> dict[str, Any]:
    """Bytes, FLOPs, memory and hours of a build of the cache that a (planned) manifest describes."""
    if manifest.is_text:
        return _text_facts(manifest, teacher, batch_size=batch_size, rate_flops=rate_flops, gpus=gpus)
    from secondcast.cache_builder.pipeline.background_writer import IN_FLIGHT
    from secondcast.cache_builder.settings import placed
    from secondcast.models.cost.counted import backbone_cost, text_encoder_cost
    from secondcast.models.cost.gpu_memory import build_host_bytes, text_stage_memory
    from secondcast.models.cost.placement import sample_stage_cost
    from secondcast.models.cost.shapes import CallShapes

    sampling, dtype_bytes = manifest.sampling, DTYPE_BYTES[manifest.sampling.dtype]
    backbone, text = backbone_cost(CallShapes.of(manifest)), text_encoder_cost(manifest)
    layout, sizes = Layout(manifest.prompts.segments), cache_sizes(manifest)
    latent_bytes = sampling.image_tokens * sampling.channels * dtype_bytes
    arrays = {size.name: size for size in sizes}
    recorded = sum(arrays[name].row_bytes for name in ("velocity", "noise", "hidden_states") if name in arrays)
    options = placed(SamplingMemory(), sampling.quantize, manifest.teacher.pooled)
    return {
        "cache": _cache_facts(manifest, layout),
        "parameters": _parameters(backbone, text, teacher),
        "arrays": [{**asdict(size), "row_bytes": size.row_bytes} for size in sizes],
        "disk": disk_facts(sizes),
        "compute": _compute_facts(
            manifest, layout, backbone, text, recorded_bytes=recorded, rate_flops=rate_flops, gpus=gpus
        ),
        "gpu_memory": {
            "text_stage": memory_facts(text_stage_memory(text, **_text_sizes(manifest, dtype_bytes, batch_size))),
            "sample_stage": memory_facts(sample_stage_cost(manifest, batch_size).memory(options)),
        },
        "host_memory_bytes": build_host_bytes(
            weights_bytes=max(backbone.parameters, text.parameters) * dtype_bytes,
            shard_bytes=int(recorded + latent_bytes) * layout.shard_size,
            in_flight=IN_FLIGHT,
        ),
    }


def _cache_facts(manifest: "Manifest", layout: Layout) -> dict[str, Any]:
    _, shards = layout.rows
    images = {}
    if not manifest.is_text:
        sampling = manifest.sampling
        images = {"height_px": sampling.height, "width_px": sampling.width, "steps": sampling.steps}
    return {
        "prompts": manifest.own_prompts,
        "trajectories": len(layout),
        "shards": len(shards),
        **images,
        "text_tokens": manifest.teacher.text_length,
        "dtype": manifest.dtype,
        **manifest.storage.json_value(),
    }


def _compute_facts(
    manifest: "Manifest",
    layout: Layout,
    backbone: "BackboneCost",
    text: "TextEncoderCost",
    *,
    recorded_bytes: float,
    rate_flops: float | None,
    gpus: int,
) -> dict[str, Any]:
    """FLOPs and hours of a build; recorded_bytes: of a trajectory."""
    text_flops = text.forward_flops * layout.embeddings.items
    trajectory_flops = backbone.forward_flops * manifest.sampling.rows_per_call * manifest.sampling.steps
    sample_flops = trajectory_flops * len(layout)
    return {
        "text_flop_per_prompt": text.forward_flops,
        "backbone_flop_per_step": backbone.forward_flops,
        "sample_flop_per_trajectory": trajectory_flops,
        "text_flop": text_flops,
        "sample_flop": sample_flops,
        "text_hours": hours_of(text_flops, rate_flops, gpus),
        "sample_hours": hours_of(sample_flops, rate_flops, gpus),
        "write_bytes_per_second": None if rate_flops is None else recorded_bytes * gpus * rate_flops / trajectory_flops,
    }


def _text_facts(
    manifest: "Manifest", teacher: "TeacherFolder", *, batch_size: int, rate_flops: float | None, gpus: int
) -> dict[str, Any]:
    """The same of a text cache, which needs the text encoder only."""
    from secondcast.cache_builder.pipeline.background_writer import IN_FLIGHT
    from secondcast.models.cost.counted import text_encoder_cost
    from secondcast.models.cost.gpu_memory import build_host_bytes, text_stage_memory

    text, dtype_bytes = text_encoder_cost(manifest), DTYPE_BYTES[manifest.dtype]
    layout, sizes = Layout(manifest.prompts.segments), cache_sizes(manifest)
    flops = text.forward_flops * layout.embeddings.items
    text_sizes = _text_sizes(manifest, dtype_bytes, batch_size)
    return {
        "cache": _cache_facts(manifest, layout),
        "parameters": {teacher.family.slot: text.parameters},
        "arrays": [{**asdict(size), "row_bytes": size.row_bytes} for size in sizes],
        "disk": disk_facts(sizes),
        "compute": {
            "text_flop_per_prompt": text.forward_flops,
            "text_flop": flops,
            "text_hours": hours_of(flops, rate_flops, gpus),
        },
        "gpu_memory": {"text_stage": memory_facts(text_stage_memory(text, **text_sizes))},
        "host_memory_bytes": build_host_bytes(
            weights_bytes=text.parameters * dtype_bytes,
            shard_bytes=int(sizes[0].row_bytes) * layout.shard_size,
            in_flight=IN_FLIGHT,
        ),
    }


def _text_sizes(manifest: "Manifest", dtype_bytes: int, batch_size: int) -> dict[str, int]:
    """Arguments of text_stage_memory."""
    from secondcast.models.cost.counted import recorded_clip_parameters

    beside = recorded_clip_parameters(manifest)
    return {"dtype_bytes": dtype_bytes, "batch_size": batch_size, "beside_parameters": beside}


def _parameters(backbone: "BackboneCost", text: "TextEncoderCost", teacher: "TeacherFolder") -> dict[str, int]:
    from secondcast.models.cost.counted import teacher_clip_parameters, vae_parameters

    parameters = {
        "transformer": backbone.parameters,
        "transformer_modulation": backbone.modulation_parameters,
        teacher.family.slot: text.parameters,
        "vae_not_loaded": vae_parameters(teacher.config("vae"), teacher.family),
    }
    if teacher.has("pooled_text_encoder"):
        loaded = "zero" not in teacher.family.pooled
        parameters["clip" if loaded else "clip_not_loaded"] = teacher_clip_parameters(teacher)
    return parameters


def disk_facts(sizes: list[Size]) -> dict[str, Any]:
    """Total bytes of all arrays."""
    return {
        "raw_bytes": sum(size.raw_bytes for size in sizes),
        "stored_low_bytes": sum(size.stored_low_bytes for size in sizes),
        "stored_high_bytes": sum(size.stored_high_bytes for size in sizes),
    }


def memory_facts(memory: "GpuMemory") -> dict[str, Any]:
    """The GPU memory of a stage, as JSON types."""
    return {
        **asdict(memory),
        "activations_bytes": memory.activations_bytes,
        "total_bytes": memory.total_bytes,
        "needed_bytes": int(memory.needed_bytes),
    }


def gpu_memory_of(facts: dict[str, Any]) -> "GpuMemory":
    """The inverse of memory_facts."""
    from secondcast.models.cost.gpu_memory import GpuMemory

    return GpuMemory(**{key: facts[key] for key in ("weights_bytes", "student_bytes", "sample_bytes", "batch_size")})


def needed_text(memory: "GpuMemory") -> str:
    """The memory that is calculated, and what a GPU must have."""
    return f"{memory.total_bytes / _GIB:.1f} GiB, {memory.needed_bytes / _GIB:.1f} with a margin,"


LARGER_CARD = "use a larger GPU"


def gpu_verdict(stage: str, facts: dict[str, Any], card: "Card", *, larger: str = LARGER_CARD) -> str:
    """Whether a stage of a build fits on a GPU, and the fix if not; `larger`: the fix if not even one row fits."""
    from secondcast.models.cost.gpu_memory import with_margin

    memory = gpu_memory_of(facts)
    needed = f"{stage}: {needed_text(memory)} at batch {memory.batch_size}, {card.name} has {card.memory_gib:.1f} GiB"
    largest = memory.largest_batch(card.memory_gib * _GIB)
    if largest >= memory.batch_size:
        return f"fits: {needed}"
    if largest:
        return f"does not fit: {needed}; --batch-size {largest} fits"
    before = with_margin(memory.total_bytes - memory.activations_bytes)
    return f"does not fit: {needed}; it needs {before / _GIB:.1f} GiB before the first sample: {larger}"


def hours_of(flop: float, rate_flops: float | None, gpus: int) -> float | None:
    """Hours for `flop` FLOPs; None if the rate is unknown."""
    return None if rate_flops is None else flop / (rate_flops * gpus) / 3600
