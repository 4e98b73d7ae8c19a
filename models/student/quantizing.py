"""Quantize a trained student for an export: the codes and scales of the modules in student_network.py."""

import copy

import torch
from torch.nn.functional import pad

from secondcast.models.memory.options import TextQuantization
from secondcast.models.student.student_network import NF4_BLOCK, NF4_LEVELS, QuantizedMatrix, SecondcastStudent

_LARGEST_CODE = 127


@torch.no_grad()
def quantized(student: SecondcastStudent, kind: TextQuantization) -> SecondcastStudent:
    """A copy of a student with its linears and its token embedding in codes; its scales are bfloat16."""
    config = copy.deepcopy(student.config)
    config.quantization = kind
    made, left = SecondcastStudent(config).eval(), student.state_dict()
    for name, module in made.named_modules():
        if isinstance(module, QuantizedMatrix):
            left[f"{name}.weight"], left[f"{name}.scale"] = _codes(student.get_parameter(f"{name}.weight"), kind)
    left.pop("encoder.shared.weight")
    made.load_state_dict(left)
    return with_stored_scales(made)


def with_stored_scales(student: SecondcastStudent) -> SecondcastStudent:
    """The same student with its scales as `quantized` makes them: loading casts them, which changes no value."""
    for module in student.modules():
        if isinstance(module, QuantizedMatrix):
            module.scale = module.scale.bfloat16()
    return student


def _codes(weight_NX: torch.Tensor, kind: TextQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as QuantizedMatrix stores them, and scales [rows, blocks]."""
    columns = weight_NX.shape[1]
    block, top = (columns, _LARGEST_CODE) if kind == "int8" else (NF4_BLOCK, 1)
    blocks_NYX = pad(weight_NX.float(), (0, -columns % block)).unflatten(1, (-1, block))
    # Rounded before it divides: a scale has the same value in bfloat16 and float32.
    scale_NY = (blocks_NYX.abs().amax(2) / top).bfloat16()
    values_NX = (blocks_NYX / scale_NY.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)).flatten(1)
    if kind == "int8":
        return values_NX.round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), scale_NY
    levels = torch.tensor(NF4_LEVELS)
    nearest_NX = torch.bucketize(values_NX, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (nearest_NX[:, ::2] * 16 + nearest_NX[:, 1::2]).view(torch.int8), scale_NY
