"""The calculated time of a step against the roofline of a simulation of FLUX.1-dev at full size (2026-11, no GPU)."""

import pytest

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.plan.cards import outline
from secondcast.models.cost.cards import find_card
from secondcast.trainer.cost.stage_cost import costs_of
from secondcast.trainer.settings import TrainFlags


@pytest.mark.thorough
def test_a_step_on_a_4090_takes_what_the_roofline_of_the_simulation_says():
    costs = costs_of({"cache": outline("FLUX.1-dev", 1000, PlannedBuild(resolution=512))[0]}, "base")
    settings = TrainFlags.from_flags(student="any", batch_size=4, activation_checkpointing=1).settings()
    cost = costs.backbones["cache"]
    rate = find_card("4090").flops_per_s(cost.moved_bytes / cost.forward_flops)
    assert costs.step_flops(settings, settings.stages[0]) / rate == pytest.approx(1.76, rel=0.03)
    # 281 GB for 125.5 TFLOP; the backward pass moves about as much for its FLOPs as the forward pass.
    assert cost.moved_bytes / cost.forward_flops == pytest.approx(281e9 / 125.5e12, rel=0.05)
