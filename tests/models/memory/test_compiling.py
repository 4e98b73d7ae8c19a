"""Compiled blocks: few graphs, the eager results but for rounding, and a refusal in one line where they cannot be."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import geometry_of
from secondcast.models.memory import compiling
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.compiling import check_compiler, compile_blocks
from secondcast.models.memory.streaming import stream_blocks
from secondcast.storage_schemas.errors import SettingsError
from tests.models.flux_calls import CPU, GEOMETRY, call, load, pairs, wide_flux

ASKED = [*pairs(guidance=True)][3:15:4]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling on a CPU needs a C++ compiler (g++)")


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def backbone(model: FluxTransformer2DModel) -> Backbone:
    return Backbone(model, GEOMETRY, text_length=5)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_blocks_share_their_graphs_whatever_is_around_them():
    plain = transformer().eval().requires_grad_(False)
    model, streamed = copy.deepcopy(plain), copy.deepcopy(plain)
    # Traced by dynamo as for inductor, and run as it is: no compiler, the same bits.
    compile_blocks(model, backend="eager")
    compile_blocks(streamed, backend="eager")
    stream_blocks(streamed, device=CPU, resident=1)
    expected = call(backbone(plain), ASKED)

    def check(compiled: FluxTransformer2DModel, compilations: int) -> None:
        for found, wanted in zip(call(backbone(compiled), ASKED), expected, strict=True):
            assert torch.equal(found, wanted)
        assert graphs() == compilations

    # Double blocks with and without a gradient of the image, of which the first one has none, and single blocks.
    check(model, 3)
    activation_checkpointing(model, 1)
    check(model, 3)
    # Those of streaming's forward pass, which has no gradients.
    for _ in range(2):
        check(streamed, 5)
    with torch.no_grad():
        velocity_BSC = predicted(backbone(model))
    assert graphs() == 5 and torch.equal(velocity_BSC, predicted(backbone(plain)).detach())


def predicted(made: Backbone) -> torch.Tensor:
    rows, geometry = len(ASKED), GEOMETRY
    return made.predict(
        torch.ones(rows, geometry.image_tokens, geometry.channels), torch.ones(rows, 5, 24), made.zero_pooled(rows),
        torch.tensor([t for t, _ in ASKED]), torch.tensor([g for _, g in ASKED]),
    )  # fmt: skip


@pytest.mark.thorough
def test_more_shapes_than_there_may_be_graphs_are_refused_and_never_computed_uncompiled(monkeypatch):
    monkeypatch.setattr(compiling, "LARGEST_GRAPHS", 2)
    model = backbone(transformer())
    compile_blocks(model.transformer, backend="eager")
    message = (
        "^the transformer's blocks need more than 2 graphs, one for each batch size, resolution and text length: use "
        "batches of one size, or remove --compile$"
    )
    with torch.no_grad():
        for size in (16, 32):
            predict_alone(model.at(geometry_of(height=size, width=size, token_px=4, channels=16)))
        with pytest.raises(SettingsError, match=message):
            predict_alone(model.at(geometry_of(height=48, width=16, token_px=4, channels=16)))


def predict_alone(made: Backbone) -> None:
    x_BSC = torch.zeros(1, made._geometry.image_tokens, 16)
    made.predict(x_BSC, torch.zeros(1, 5, 24), made.zero_pooled(1), torch.ones(1), torch.ones(1))


def test_a_machine_without_a_compiler_is_told_so_before_weights_are_read():
    message = (
        r"^--compile does not work on cpu \(No working C\+\+ compiler found in .*'g-plus-plus'\)\): install a C\+\+ "
        r"compiler such as g\+\+, or name it in CXX; or remove the flag, which only makes training slower$"
    )
    # What CXX says is read when torch is imported.
    with torch._inductor.config.patch({"cpp.cxx": (None, "g-plus-plus")}), pytest.raises(SettingsError, match=message):
        check_compiler(CPU)


@pytest.mark.thorough
def test_a_block_that_cannot_be_compiled_is_refused_in_one_line():
    def fails(graph, inputs):
        raise RuntimeError("no such kernel")

    model = backbone(transformer())
    compile_blocks(model.transformer, backend=fails)
    message = r"^--compile does not work on the transformer's blocks \(.*no such kernel.*\): remove the flag, or "
    r"--attention-backend or --quantize if one of them is given$"
    with pytest.raises(SettingsError, match=message):
        predict_alone(model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_flux(tmp_path_factory.mktemp("wide"), guidance=True)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.slow
@needs_compiler
# Measured: 0 to 6e-7, and 0 on a CPU in bfloat16, for which compiled operations round where uncompiled ones do.
@pytest.mark.parametrize(
    ("dtype", "batch_rows", "bound"), [(torch.float32, 3, 2e-6), (torch.bfloat16, None, 5e-3)], ids=["table", "live"]
)
def test_output_and_gradient_are_the_uncompiled_ones_but_for_rounding(wide, dtype, batch_rows, bound):
    expected = call(load(wide, dtype, batch_rows=batch_rows), ASKED)
    compiled = call(load(wide, dtype, batch_rows=batch_rows, compile=True), ASKED)
    for found, wanted in zip(compiled, expected, strict=True):
        assert error(found, wanted) < bound
    if batch_rows is None:
        return
    # Of these, each has the very graphs of the first one.
    for options in ({"activation_checkpointing": 1}, {"activation_checkpointing": 2}, {"gpu_blocks": 1}):
        found = call(load(wide, dtype, batch_rows=batch_rows, compile=True, **options), ASKED)
        assert all(torch.equal(one, other) for one, other in zip(found, compiled, strict=True)), options


@pytest.mark.slow
@needs_compiler
def test_a_compiler_that_is_there_is_found():
    check_compiler(CPU)
