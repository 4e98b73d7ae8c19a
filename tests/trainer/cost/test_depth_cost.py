"""What a step of the depth loss costs, against the same step run at FLUX.1-dev's size on the meta device."""

import pytest
import torch

from secondcast.models.backbone import Backbone
from secondcast.models.cost.cards import COPY_BYTES_PER_SECOND
from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.counting import transformer_of
from secondcast.models.cost.gpu_memory import held_weights, with_margin
from secondcast.models.cost.network_costs import BackboneCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.families.flux import FLUX
from secondcast.models.geometry import Geometry
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.meta_run import count_flops, parameter_count, peak_bytes
from secondcast.models.memory.options import PLAIN, MemoryOptions
from secondcast.trainer.cost.fitting import fit
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.data.replay_dataset import Batch
from secondcast.trainer.losses.depth import depth_errors
from secondcast.trainer.run.config import StreamVariances
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from tests.models.cost.test_cost import outline

META = torch.device("meta")
SHAPES = CallShapes.of(outline())
DOUBLE, SINGLE = 19, 38
GIB = 2**30


@pytest.fixture(scope="module")
def cost() -> BackboneCost:
    return backbone_cost(SHAPES)


def part(blocks: int) -> Backbone:
    """The first blocks of FLUX.1-dev for 512 px, without data."""
    counts = (min(blocks, DOUBLE), max(0, blocks - DOUBLE))
    transformer = transformer_of(FLUX, SHAPES.config, counts, torch.bfloat16)
    for name in FLUX.anatomy.head:
        delattr(transformer, name)
    geometry = Geometry(height=1, width=1, rows=SHAPES.image_tokens, columns=1, channels=SHAPES.channels)
    return Backbone(transformer, geometry, text_length=SHAPES.text_length, device=META)


def step(backbone: Backbone, blocks: int):
    """Forward and backward pass of the depth loss of one sample."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=torch.bfloat16, device=META)

    teacher_BTD = empty(SHAPES.text_length, SHAPES.text_width)
    latent_BSC = empty(SHAPES.image_tokens, SHAPES.channels)
    batch = Batch(
        source=0, token_ids_BT=empty(), hidden_states_BSC=latent_BSC, velocity_BSC=latent_BSC,
        conditioning={"pooled_projections": empty(SHAPES.pooled_width)},
        timestep_B=empty(), guidance_B=empty().float(), step_B=empty(),
        encoder_hidden_states_BTD=teacher_BTD,
    )  # fmt: skip
    variances = StreamVariances(blocks=blocks, hidden_states=1, encoder_hidden_states=1)
    student_BTD = torch.empty_like(teacher_BTD, requires_grad=True)
    return lambda: depth_errors(backbone, student_BTD, batch, variances).mean().backward()


@pytest.mark.parametrize("blocks", [1, 2, DOUBLE, DOUBLE + 2, DOUBLE + SINGLE])
def test_the_first_blocks_have_the_weights_that_are_loaded(cost, blocks):
    assert cost.first(blocks).parameters == parameter_count(part(blocks).transformer)
    assert cost.first(blocks).blocks == blocks


@pytest.mark.thorough
@pytest.mark.parametrize("blocks", [1, 2, DOUBLE + 2])
@pytest.mark.parametrize("options", [PLAIN, MemoryOptions(activation_checkpointing=1)], ids=["plain", "recomputed"])
def test_flops_of_a_step_are_those_that_are_counted(cost, blocks, options):
    planned = cost.first(blocks).forward_flops + cost.training_flops(options, blocks)
    backbone = part(blocks)
    activation_checkpointing(backbone.transformer, options.activation_checkpointing)
    counted = count_flops(step(backbone, blocks)).total
    # The backward pass of a fused attention kernel has 5 products, counted are 4.
    counted += 0.5 * cost.first(blocks).attention_flops
    assert planned == pytest.approx(counted, rel=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("blocks", [1, 4, DOUBLE + 2])
def test_activations_of_a_step_fit_into_what_is_planned(cost, blocks):
    backbone = part(blocks)
    peak = peak_bytes(step(backbone, blocks), list(backbone.transformer.parameters()), gradients=True)
    # The first block saves less than is planned for each: no gradient flows to its image tokens.
    assert 0.99 * peak < cost.training_bytes(blocks=blocks) < peak + cost.kinds[0].saved_bytes


def test_a_run_of_the_depth_loss_is_planned_with_the_weights_of_its_blocks_alone(cost):
    costs, settings = planned(stage("early", "context"), stage("main", "depth", depth_blocks=2))
    memory = costs.memory(settings)
    rows = costs.table_rows
    first = cost.first(2)
    linears = first.parameters - first.modulation_parameters - first.conditioning_parameters
    assert memory.weights_bytes == 2 * (linears + rows * first.modulation_width) < GIB
    main = settings.stages[1]
    assert costs.stage_memory(settings, main).sample_bytes == first.training_bytes() + costs.student.saved_bytes
    student = 3 * costs.student.forward_flops
    row = 2 * first.forward_flops + first.backward_flops + student
    assert costs.step_flops(settings, main) == pytest.approx(main.batch_size * row)
    # About a fortieth of a vision step for one block, twice that for two.
    vision = costs.step_flops(settings, main.model_copy(update={"loss": "vision"}))
    assert 1 / 30 < costs.step_flops(settings, main) / vision < 1 / 10


def test_before_a_vision_stage_the_whole_transformer_is_planned(cost):
    costs, settings = planned(stage("early", "depth", depth_blocks=2), stage("main", "vision"))
    early = settings.stages[0]
    alone = planned(early)
    assert costs.memory(settings).weights_bytes > 10 * alone[0].memory(alone[1]).weights_bytes
    assert costs.stage_memory(settings, early).sample_bytes == alone[0].memory(alone[1]).sample_bytes
    assert costs.step_flops(settings, early) == alone[0].step_flops(alone[1], early)


def test_only_streamed_blocks_that_are_run_are_copied_for_the_teacher_and_the_student():
    costs, settings = planned(stage("early", "depth", depth_blocks=2), stage("main", "vision"), gpu_blocks=0)
    early, main = settings.stages
    held = held_weights(costs.loaded(settings), settings.memory, dtype_bytes=2, table_rows=costs.table_rows)
    whole, first = held.pinned_bytes, held.streamed_bytes[0] + held.streamed_bytes[1]
    assert costs.step_copy_seconds(settings, main) == pytest.approx(2 * whole / COPY_BYTES_PER_SECOND)
    assert costs.step_copy_seconds(settings, early) == pytest.approx(3 * first / COPY_BYTES_PER_SECOND)


def test_what_makes_it_fit_is_chosen_among_the_blocks_that_are_loaded():
    costs, settings = planned(stage("main", "depth", depth_blocks=4, batch_size=32))
    memory_bytes = with_margin(0.8 * costs.memory(settings).total_bytes)
    found = fit(settings, costs, memory_bytes=memory_bytes).settings
    assert 1 <= found.activation_checkpointing <= 4 and costs.memory(found).needed_bytes <= memory_bytes


def stage(name: str, loss: str, **options) -> Stage:
    return Stage(name=name, loss=loss, steps=2, **{"batch_size": 4} | options)


def planned(*stages: Stage, **options) -> tuple[Costs, TrainSettings]:
    return costs_of({"cache": outline()}, "base"), TrainSettings(student="base", stages=stages, **options)
