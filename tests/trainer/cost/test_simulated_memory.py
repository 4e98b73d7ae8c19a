"""Calculated GPU memory against a simulation of FLUX.1-dev at full size, to within 3 %.

The simulation ran this project's training step and sampling on fake CUDA tensors, with a model of the caching allocator
(2026-11, all 19 + 38 blocks, T5-base; no GPU). Its figures are without CUDA's own memory.
"""

import pytest

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.plan.cards import outline
from secondcast.models.cost.cards import find_card
from secondcast.models.cost.gpu_memory import GpuMemory
from secondcast.models.cost.placement import sample_stage_cost
from secondcast.models.memory.options import MemoryOptions
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.settings import TrainFlags

GIB = 2**30
RECOMPUTED = {"activation_checkpointing": 1}


@pytest.fixture(scope="module")
def costs() -> dict[int, Costs]:
    return {
        pixels: costs_of({"cache": outline("FLUX.1-dev", 1000, PlannedBuild(resolution=pixels))[0]}, "base")
        for pixels in (512, 1024)
    }


def own_gib(memory: GpuMemory) -> float:
    return (memory.total_bytes - memory.cuda_bytes) / GIB


@pytest.mark.parametrize(
    ("pixels", "flags", "simulated_gib"),
    [
        (512, {}, 34.93),
        (512, RECOMPUTED, 20.33),
        (512, RECOMPUTED | {"batch_size": 1}, 18.67),
        (512, RECOMPUTED | {"gpu_blocks": 28}, 13.06),
        (512, RECOMPUTED | {"gpu_blocks": 0}, 5.03),
        (512, RECOMPUTED | {"quantize": "int8"}, 12.56),
        (1024, RECOMPUTED, 25.96),
        (1024, {"activation_checkpointing": 4}, 67.62),
        (1024, RECOMPUTED | {"gpu_blocks": 0, "grad_accum_steps": 2}, 7.08),
    ],
)
def test_training_needs_what_the_simulation_allocated(costs, pixels, flags, simulated_gib):
    settings = TrainFlags.from_flags(student="any", **{"batch_size": 4, **flags}).settings()
    assert own_gib(costs[pixels].memory(settings)) == pytest.approx(simulated_gib, rel=0.03)


@pytest.mark.parametrize(("pixels", "simulated_gib"), [(512, 24.01), (1024, 29.15)])
def test_building_needs_what_the_simulation_allocated(pixels, simulated_gib):
    manifest = outline("FLUX.1-dev", 1000, PlannedBuild(resolution=pixels))[0]
    memory = sample_stage_cost(manifest, 16).memory(MemoryOptions(modulation="gpu"))
    assert own_gib(memory) == pytest.approx(simulated_gib, rel=0.03)


def test_a_step_on_a_4090_takes_what_the_roofline_of_the_simulation_says(costs):
    settings = TrainFlags.from_flags(student="any", batch_size=4, **RECOMPUTED).settings()
    cost = costs[512].backbones["cache"]
    rate = find_card("4090").flops_per_s(cost.moved_bytes / cost.forward_flops)
    assert costs[512].step_flops(settings, settings.stages[0]) / rate == pytest.approx(1.76, rel=0.03)
    # 281 GB for 125.5 TFLOP; the backward pass moves about as much for its FLOPs as the forward pass.
    assert cost.moved_bytes / cost.forward_flops == pytest.approx(281e9 / 125.5e12, rel=0.05)
