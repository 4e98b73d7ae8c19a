"""Quantized blocks: how far off they are, what they weigh, and that nothing else is touched."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.backbone import Backbone
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.quantized import quantize_blocks
from secondcast.storage_schemas.errors import MissingExtraError
from tests.models.flux_calls import CPU, GEOMETRY, call, load, pairs, wide_flux

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
ASKED = [*pairs(guidance=True)][3:15:4]
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Largest relative errors of the prediction and of the gradient towards the embedding, with these random weights.
BOUNDS = {"int8": (0.005, 0.02), "fp8": (0.01, 0.08), "nf4": (0.015, 0.25)}
MODULATION = {"norm1.linear", "norm1_context.linear", "norm.linear"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_flux(tmp_path_factory.mktemp("wide"), guidance=True)


# NF4 on a CPU takes its time, and calls change nothing.
@cache
def quantized(folder: Path, dtype: torch.dtype, kind: str, **options) -> Backbone:
    return load(folder, dtype, quantize=kind, **{"activation_checkpointing": 1, **options})


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def plain_linears(transformer: torch.nn.Module) -> set[str]:
    """Names of the linears whose weights are ordinary tensors."""
    return {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module) is torch.nn.Linear
        and type(module.weight.data) is torch.Tensor
    }


def stored_bytes(block: torch.nn.Module) -> int:
    """Of all tensors that a block's parameters are made of."""
    total = 0
    for parameter in block.parameters():
        parts = [getattr(parameter, name, None) for name in ("qdata", "scale", "zero_point")]
        if parts[0] is None:
            parts = [parameter.data]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts.append(state.absmax)
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total


@pytest.mark.thorough
@KINDS
@DTYPES
def test_prediction_and_gradient_are_off_by_no_more_than_stated_and_not_by_nothing(wide, dtype, kind):
    plain, backbone = load(wide, dtype, batch_rows=3), quantized(wide, dtype, kind, batch_rows=3)
    errors = [error(a, b) for a, b in zip(call(backbone, ASKED), call(plain, ASKED), strict=True)]
    assert all(0 < found < bound for found, bound in zip(errors, BOUNDS[kind], strict=True)), errors
    assert not any(parameter.requires_grad for parameter in backbone.transformer.parameters())
    assert all(parameter.grad is None for parameter in backbone.transformer.parameters())
    assert backbone.dtype == backbone.at(GEOMETRY).dtype == dtype


@pytest.mark.thorough
@KINDS
def test_a_table_and_live_modulation_give_the_same_bits(wide, kind):
    made = [call(quantized(wide, torch.float32, kind, batch_rows=rows), ASKED) for rows in (3, None)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_keeps_the_bits_of_nf4(wide, every):
    made = [
        call(quantized(wide, torch.bfloat16, "nf4", batch_rows=3, activation_checkpointing=n), ASKED)
        for n in (0, every)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.thorough
@KINDS
def test_a_prediction_without_a_gradient_leaves_the_weights_fit_for_one_with(wide, kind):
    fresh = quantized(wide, torch.bfloat16, kind, batch_rows=3)
    used = load(wide, torch.bfloat16, quantize=kind, activation_checkpointing=1)
    with torch.no_grad():
        used.predict(
            torch.zeros(1, 16, 16).bfloat16(), torch.zeros(1, 5, 24).bfloat16(), used.zero_pooled(1),
            torch.ones(1).bfloat16(), torch.ones(1),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(call(used, ASKED), call(fresh, ASKED), strict=True))


@KINDS
def test_only_the_linears_of_blocks_are_quantized_and_of_them_not_the_modulation(wide, kind):
    transformer = quantized(wide, torch.bfloat16, kind).transformer
    before = plain_linears(load(wide, torch.bfloat16).transformer)
    inside = {name for name in before if "transformer_blocks." in name}
    modulation = {name for name in inside if any(name.endswith(end) for end in MODULATION)}
    assert plain_linears(transformer) == (before - inside) | modulation
    assert len(inside - modulation) == 2 * 12 + 3 * 5
    # With a table nothing of the blocks is left out.
    tabled = quantized(wide, torch.bfloat16, kind, batch_rows=3).transformer
    assert not any("transformer_blocks." in name for name in plain_linears(tabled))


# Of a weight of 16 bits; a scale in float32 for each output of 256 inputs, or for each 64 weights.
@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.5, 0.53), ("fp8", 0.5, 0.52), ("nf4", 0.25, 0.29)])
def test_the_weights_shrink(wide, kind, least, most):
    def blocks(options: dict[str, object]) -> int:
        transformer = load(wide, torch.bfloat16, batch_rows=3, activation_checkpointing=1, **options).transformer
        return sum(stored_bytes(b) for b in (*transformer.transformer_blocks, *transformer.single_transformer_blocks))

    assert least < blocks({"quantize": kind}) / blocks({}) < most


def test_one_block_at_a_time_is_put_on_the_device(wide):
    transformer, held = FluxTransformer2DModel.from_pretrained(wide, subfolder="transformer"), []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    moves = [type(block).to for block in blocks]

    def watching(block, move):
        def to(device):
            held.append([plain_linears(other) for other in blocks])
            return move(block, device)

        return to

    for block, move in zip(blocks, moves, strict=True):
        block.to = watching(block, move)
    quantize_blocks(transformer, "nf4", CPU)
    # When a block is moved, those before it hold quantized weights alone, the modulation apart.
    assert len(held) == len(blocks)
    for number, names in enumerate(held):
        assert all(names[earlier] <= MODULATION for earlier in range(number))
        assert not names[number] <= MODULATION


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")])
def test_without_its_package_the_extra_is_named_before_weights_are_read(tmp_path, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        Backbone.load(
            tmp_path, GEOMETRY, text_length=5, dtype=torch.bfloat16, device=CPU,
            options=MemoryOptions(quantize=kind, activation_checkpointing=1),
        )  # fmt: skip
    assert str(caught.value) == (
        f"{kind} weights need {package}, which is not installed: pip install 'secondcast[quant]'"
    )


def test_settings_of_torchs_compiler_stay_as_they_are(wide):
    import torch._inductor.config as config

    before = config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    for kind in ("int8", "fp8"):
        quantized(wide, torch.float32, kind)
    assert (config.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before
