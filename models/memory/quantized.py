"""A frozen transformer whose blocks have weights of 8 or 4 bits: less memory for other numbers.

Only the linears inside the blocks are quantized, and of those not the ones that make modulation vectors. A table
stands for these with its exact results (models/memory/modulation_table.py): a transformer with a table and one without
give the same numbers, so that a cache that was sampled without one replays with one. What is quantized computes in the
dtype that it had.
"""

from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.memory.modulation_table import MODULATION
from secondcast.models.memory.optional_packages import QUANTIZERS, installed_version, show_quantizer
from secondcast.storage_schemas.errors import MissingExtraError
from secondcast.storage_schemas.schema.manifest import Quantization


def check_quantizer(kind: Quantization) -> None:
    """Raise MissingExtraError unless what quantizes so is installed."""
    if kind == "none":
        return
    show_quantizer(kind)
    try:
        import_module(QUANTIZERS[kind])
    except ImportError as error:
        raise MissingExtraError(
            f"weights of {kind} need {QUANTIZERS[kind]}, which is not installed: pip install 'secondcast[quant]'"
        ) from error


def quantizer(kind: Quantization) -> str | None:
    """What quantizes so here, "torchao 0.18.0": the bits depend on it. None for "none"."""
    return None if kind == "none" else f"{QUANTIZERS[kind]} {installed_version(kind)}"


@torch.no_grad()
def quantize_blocks(transformer: FluxTransformer2DModel, kind: Quantization, device: torch.device) -> None:
    """Put the blocks of a transformer on a device, the weights of their linears in 8 or 4 bits; "none": do nothing.

    One block at a time: the device never holds more than one that is not quantized, and what the host held of it is
    freed. All else stays where it is. int8: a scale for each output. fp8: e4m3, likewise; weights alone, so that the
    product is one of the compute dtype on any card. nf4: blocks of 64, their scales in float32. MissingExtraError.
    """
    if kind == "none":
        return
    check_quantizer(kind)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.to(device)
        if kind == "nf4":
            for name, linear in _linears(block):
                block.set_submodule(name, _in_four_bits(linear))
        else:
            _to_eight_bits(block, kind, {linear for _, linear in _linears(block)})


@torch.no_grad()
def quantize_text_encoder(model: torch.nn.Module) -> None:
    """Put the weights of all linears of a text encoder in 8 bits, where it lies; its embeddings stay. MissingExtraError."""
    check_quantizer("int8")
    _to_eight_bits(model, "int8", {module for module in model.modules() if isinstance(module, torch.nn.Linear)})


def _linears(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith(MODULATION):
            yield name, module


def _to_eight_bits(model: torch.nn.Module, kind: Quantization, chosen: Collection[torch.nn.Module]) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    make = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    # The settings it would make for torch's compiler hold for the whole process, the student's part of it too.
    quantize_(model, make(set_inductor_config=False), filter_fn=lambda module, _: module in chosen)


def _in_four_bits(linear: torch.nn.Linear) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    # Scales of scales would save 0.4 bits a weight, and round once more.
    how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        device="meta",
        **how,
    )
    made.bias = linear.bias
    # `to` quantizes.
    made.weight = Params4bit(linear.weight.data, requires_grad=False, **how).to(linear.weight.device)
    # For inference alone it repacks weights on some processors, for good: no gradient passes through them then.
    made.support_avx512bf16_for_cpu = False
    return made
