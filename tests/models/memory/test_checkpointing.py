"""Checkpointing of blocks: the same bits, less kept, and as many blocks computed again as asked for."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.cache_builder.opening.new_manifest import outline_manifest
from secondcast.cache_builder.settings import PlannedBuild
from secondcast.models.backbone import Backbone
from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.memory.blocks import checkpointed_blocks
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.meta_run import saved_bytes
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from tests.models.flux_calls import call, load, pairs, wide_flux

ASKED = [*pairs(guidance=True)][3:15:4]
BLOCKS = 5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_flux(tmp_path_factory.mktemp("wide"), guidance=True)


def blocks(backbone: Backbone) -> list[torch.nn.Module]:
    return [*backbone.transformer.transformer_blocks, *backbone.transformer.single_transformer_blocks]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("batch_rows", [None, 3])
def test_output_and_gradient_keep_their_bits(wide, batch_rows, every, dtype):
    plain = load(wide, dtype, batch_rows=batch_rows)
    checkpointed = load(wide, dtype, batch_rows=batch_rows, activation_checkpointing=every)
    for found, expected in zip(call(checkpointed, ASKED), call(plain, ASKED), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("every", "again"), [(0, 0), (1, 5), (2, 3), (3, 2), (9, 1)])
def test_so_many_blocks_are_computed_again(wide, every, again):
    backbone, calls = load(wide, torch.float32, batch_rows=3, activation_checkpointing=every), Counter[int]()
    for number, block in enumerate(blocks(backbone)):
        block.register_forward_pre_hook(lambda module, inputs, number=number: calls.update([number]))
    call(backbone, ASKED)
    assert [number for number in range(BLOCKS) if calls[number] == 2] == list(checkpointed_blocks(BLOCKS, every))
    assert calls.total() == BLOCKS + again
    calls.clear()
    with torch.no_grad():
        predict(backbone)
    assert calls.total() == BLOCKS


def predict(backbone: Backbone, *, gradient: bool = False, first: int = 0) -> torch.Tensor:
    rows = ASKED[first : first + 2]
    return backbone.predict(
        torch.ones(len(rows), 16, 16, dtype=backbone.dtype),
        torch.ones(len(rows), 5, 24, dtype=backbone.dtype, requires_grad=gradient),
        backbone.zero_pooled(len(rows)),
        torch.tensor([t for t, _ in rows], dtype=backbone.dtype),
        torch.tensor([g for _, g in rows]),
    )


@pytest.mark.thorough
def test_a_backward_pass_after_another_forward_pass_reads_its_own_rows(wide):
    gradients = []
    for every in (0, 1):
        backbone = load(wide, torch.float32, batch_rows=2, activation_checkpointing=every)
        text_BTD = torch.ones(2, 5, 24, requires_grad=True)
        timestep_B, guidance_B = torch.tensor([1.0, 0.25]), torch.tensor([2.0, 5.0])
        velocity_BSC = backbone.predict(
            torch.ones(2, 16, 16), text_BTD, backbone.zero_pooled(2), timestep_B, guidance_B
        )
        predict(backbone, gradient=True, first=1)
        velocity_BSC.square().sum().backward()
        gradients.append(text_BTD.grad)
    assert torch.equal(*gradients)


@pytest.mark.thorough
def test_less_is_kept_the_more_blocks_are_checkpointed(wide):
    def kept(every: int) -> int:
        backbone = load(wide, torch.float32, batch_rows=2, activation_checkpointing=every)
        known = [*backbone.transformer.parameters(), *backbone.transformer.buffers()]
        return saved_bytes(lambda: predict(backbone, gradient=True), known)

    assert kept(1) < kept(2) < kept(4) < kept(0)
    assert kept(1) < kept(0) / 8


@pytest.mark.slow
def test_the_calculated_bytes_of_blocks_are_those_that_are_kept(dev_teacher):
    flags = {"dtype": "float32", "text_length": 5, "guidance": (2.0,)}
    manifest = outline_manifest(PlannedBuild(**flags), find_teacher(str(dev_teacher), BUILD_PARTS), prompt_count=9)
    config = manifest.teacher.backbone_config | {"num_layers": 3, "num_single_layers": 4}
    teacher = manifest.teacher.model_copy(update={"backbone_config": config})
    cost = backbone_cost(CallShapes.of(manifest.model_copy(update={"teacher": teacher})))
    tokens = manifest.sampling.image_tokens
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config).eval().requires_grad_(False)
    arguments = {
        "hidden_states": torch.empty(1, tokens, 16), "encoder_hidden_states": torch.empty(1, 5, 24, requires_grad=True),
        "pooled_projections": torch.empty(1, 8), "timestep": torch.empty(1), "guidance": torch.empty(1),
        "img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(5, 3),
    }  # fmt: skip
    given = {name: value.to("meta") for name, value in arguments.items()}
    for every in (1, 2, 3):
        activation_checkpointing(transformer, every)
        found = saved_bytes(lambda: transformer(**given, return_dict=False)[0], list(transformer.parameters()))
        calculated = cost.outer_bytes
        for number in range(cost.blocks):
            calculated += cost.kind_of(number).saved_bytes if number % every else cost.checkpoint_bytes
        # Where plain and checkpointed blocks meet, they keep other tensors than among their like.
        assert found == calculated or (every > 1 and found == pytest.approx(calculated, rel=0.03))
