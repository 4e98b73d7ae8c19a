"""Quantization of the frozen transformer's blocks to 8 or 4 bits: less memory, different results.

Only linears inside the blocks are quantized, except the modulation linears, which a table may replace by exact results
(models/memory/modulation_table.py): a cache that was sampled without a table can be replayed with one. Quantized
linears compute in their original dtype.
"""

from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

import torch

from secondcast.models.families.registry import anatomy_of
from secondcast.models.memory.optional_packages import QUANTIZERS, installed_version, show_quantizer
from secondcast.models.memory.options import TextQuantization
from secondcast.storage_schemas.errors import MissingExtraError
from secondcast.storage_schemas.schema.recording import Quantization


def check_quantizer(kind: Quantization) -> None:
    """Raise MissingExtraError unless the package for this kind is installed."""
    if kind == "none":
        return
    show_quantizer(kind)
    try:
        import_module(QUANTIZERS[kind])
    except ImportError as error:
        raise MissingExtraError(
            f"{kind} weights need {QUANTIZERS[kind]}, which is not installed: pip install 'secondcast[quant]'"
        ) from error


def quantizer(kind: Quantization) -> str | None:
    """The installed package for this kind, such as "torchao 0.18.0": the bits depend on it. None for "none"."""
    return None if kind == "none" else f"{QUANTIZERS[kind]} {installed_version(kind)}"


@torch.no_grad()
def quantize_blocks(transformer: Any, kind: Quantization, device: torch.device) -> None:
    """Move the blocks of a transformer to a device with their linears in 8 or 4 bits; "none": do nothing.

    Works block by block: the device holds at most one unquantized block, and its host memory is freed. Everything else
    stays where it is. int8: one scale per output. fp8: e4m3, likewise; weight-only, so that products are in the compute
    dtype on any GPU. nf4: blocks of 64 weights with float32 scales. Raises MissingExtraError.
    """
    if kind == "none":
        return
    check_quantizer(kind)
    anatomy = anatomy_of(transformer)
    for block in anatomy.blocks(transformer):
        block.to(device)
        linears = list(_linears(block, anatomy.modulation))
        if kind == "nf4":
            for name, linear in linears:
                block.set_submodule(name, _in_four_bits(linear))
        else:
            _to_eight_bits(block, kind, {linear for _, linear in linears})


@torch.no_grad()
def quantize_text_encoder(model: torch.nn.Module, kind: TextQuantization = "int8") -> None:
    """Quantize the linears of a large text encoder in place, but not its embeddings. Raises MissingExtraError.

    nf4: without the last linear of each feed-forward block, to whose dtype transformers casts its input.
    """
    check_quantizer(kind)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if kind == "int8":
        _to_eight_bits(model, kind, {module for _, module in linears})
        return
    for name, linear in linears:
        if not name.endswith(".wo"):
            model.set_submodule(name, _in_four_bits(linear))


def held_bytes(network: torch.nn.Module) -> int:
    """Bytes in memory of all tensors of a network, quantized or not."""
    return sum(_bytes(tensor) for tensor in (*network.parameters(), *network.buffers()))


def _bytes(tensor: torch.Tensor) -> int:
    # torchao's tensors have the shape and the dtype of what they stand for; bitsandbytes has scales beside the codes.
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    scales = getattr(tensor, "quant_state", None)
    return tensor.nbytes + (0 if scales is None else scales.absmax.nbytes)


def _linears(block: torch.nn.Module, modulation: tuple[str, ...]) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith(modulation):
            yield name, module


def _to_eight_bits(model: torch.nn.Module, kind: Quantization, chosen: Collection[torch.nn.Module]) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    make = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    # Inductor settings would apply to the whole process, including the student.
    quantize_(model, make(set_inductor_config=False), filter_fn=lambda module, _: module in chosen)


def _in_four_bits(linear: torch.nn.Linear) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    # Double quantization would save 0.4 bits per weight, but add a rounding.
    how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    quantized = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        device="meta",
        **how,
    )
    quantized.bias = linear.bias
    # `to` quantizes.
    quantized.weight = Params4bit(linear.weight.data, requires_grad=False, **how).to(linear.weight.device)
    # On some processors it would repack the weights permanently for inference, without gradients.
    quantized.support_avx512bf16_for_cpu = False
    return quantized
