"""A student too large for every process to hold: divided by torch's fully_shard (FSDP2), whole again on disk."""

import copy
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from secondcast.models.student.student import Student
from secondcast.storage_schemas.errors import StudentError


def shard(student: Student, device: torch.device, ranks: int) -> Student:
    """Divide each layer of a student, and what is left of it, among the processes; fp32, in place.

    All processes hold the same student before.
    """
    names = {name for module in student.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [module for module in student.modules() if type(module).__name__ in names]
    if not layers:
        raise StudentError(
            f"--fsdp divides a student layer by layer, and a {type(student).__name__} names none of its "
            f"layers: leave the flag out"
        )
    mesh = init_device_mesh(device.type, (ranks,))
    for module in (*layers, student):
        # Also the outermost, which by default stays whole after a forward pass: until then its tensors are no shards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Nobody changes the student's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    return student


def whole_tensors(named: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Tensors on the host, gathered where they are shards; all processes call it, those that keep nothing get {}."""
    tensors = {}
    for name, value in named:
        value = value.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            tensors[name] = whole.cpu().contiguous()
    return tensors


def held_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of another one, and divided as that one is; every process has it whole."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def load_tensors(student: Student, tensors: Mapping[str, torch.Tensor], *, strict: bool) -> None:
    """Give a student, or its shards, whole tensors."""
    held = student.state_dict()
    placed = {name: held_as(value, held[name]) if name in held else value for name, value in tensors.items()}
    student.load_state_dict(placed, strict=strict)


def whole_norm(norm: torch.Tensor) -> torch.Tensor:
    """A norm over all processes, on the device still."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shell_of(student: Student) -> Student:
    """A copy of a student before it is divided, to write it with: on the host, its values do not matter."""
    return copy.deepcopy(student).cpu().eval().requires_grad_(False)
