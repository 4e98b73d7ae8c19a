"""Bit-exact conversion between numpy (bfloat16 of ml_dtypes) and torch, which is imported only on use."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from secondcast.storage_schemas.schema.fields import DTYPES, Array, Arrays

if TYPE_CHECKING:
    import torch


def to_torch(array: Array) -> "torch.Tensor":
    """A CPU tensor with the bits of an array, whose dtype may be bfloat16; copies where the array is read-only."""
    import torch

    writable = np.require(array, requirements=["C", "W"])
    if array.dtype == DTYPES["bfloat16"]:
        # torch refuses arrays of ml_dtypes: pass the bits.
        return torch.from_numpy(writable.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def stacked(rows: Sequence[Arrays]) -> "dict[str, torch.Tensor]":
    """CPU tensors of several rows of the same arrays, by their names."""
    return {name: to_torch(np.stack([row[name] for row in rows])) for name in rows[0]}


def from_torch(tensor: "torch.Tensor") -> Array:
    """A numpy array with the bits of a bfloat16 or float32 tensor, on the host."""
    import torch

    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    return host.numpy()
