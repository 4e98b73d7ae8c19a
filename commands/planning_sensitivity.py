"""What `understudy plan sensitivity` prints, as plain JSON types. Keys end in their unit."""

from typing import TYPE_CHECKING, Any

from commands.planning import DTYPE_BYTES, hours_of, memory_facts

if TYPE_CHECKING:
    from cache_builder.sensitivity_plan import SensitivitySettings
    from storage_schemas.manifest import Manifest

_FLOAT32, _FLOAT64 = 4, 8


def sensitivity_facts(
    manifest: "Manifest", settings: "SensitivitySettings", *, rate_flops: float | None, gpus: int
) -> dict[str, Any]:
    """FLOPs, hours, bytes and memory of a measurement on a (planned) cache."""
    from models.cost import backbone_cost
    from models.memory import GpuMemory, held_weights, table_rows
    from models.memory_options import MemoryOptions

    backbone, teacher = backbone_cost(manifest), manifest.teacher
    options = MemoryOptions(**{name: getattr(settings, name) for name in MemoryOptions.model_fields})
    steps = settings.steps or manifest.sampling.steps
    # A forward pass serves all products; blocks that are computed again are so for each.
    again = backbone.training_flops(options) - backbone.forward_flops - backbone.backward_flops
    of_step = backbone.forward_flops + settings.products * (again + backbone.backward_flops)
    products_bytes = settings.part_size * settings.products * teacher.text_length * teacher.text_width * _FLOAT32
    outer_bytes = teacher.text_width**2 * _FLOAT64
    held = held_weights(
        backbone,
        options,
        dtype_bytes=DTYPE_BYTES[manifest.sampling.dtype],
        table_rows=table_rows(manifest),
    )
    memory = GpuMemory(
        weights_bytes=held.device_bytes + products_bytes + 2 * outer_bytes,
        student_bytes=0,
        sample_bytes=backbone.training_bytes(options),
        batch_size=settings.batch_size,
    )
    flop = settings.prompts * steps * of_step
    parts = -(-settings.prompts // settings.part_size)
    return {
        "prompts": settings.prompts,
        "products": settings.products,
        "steps": steps,
        "flop_per_prompt": steps * of_step,
        "hours": hours_of(flop, rate_flops, gpus),
        "parts": parts,
        "parts_bytes": parts * outer_bytes,
        "kept_bytes": outer_bytes // 2 + settings.prompts * teacher.text_length * _FLOAT32,
        "gpu_memory": memory_facts(memory),
    }
