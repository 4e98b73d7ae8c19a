"""Sharding of a large student across processes with torch's fully_shard (FSDP2); checkpoints are unsharded."""

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
    """Shard each layer of a student, and the rest of it, across the processes; fp32, in place.

    All processes start with the same student.
    """
    names = {name for module in student.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [module for module in student.modules() if type(module).__name__ in names]
    if not layers:
        raise StudentError(
            f"--fsdp shards a student layer by layer, but {type(student).__name__} names no layers: remove the flag"
        )
    mesh = init_device_mesh(device.type, (ranks,))
    for module in (*layers, student):
        # Including the root module, which FSDP2 by default does not reshard after a forward pass.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # The student's output is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    return student


def full_tensors(named: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Unsharded tensors on the host; called by all processes, of which those with keep=False get {}."""
    tensors = {}
    for name, value in named:
        value = value.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            tensors[name] = whole.cpu().contiguous()
    return tensors


def held_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An unsharded tensor on the device and with the sharding of another one; every process passes the whole tensor."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def load_tensors(student: Student, tensors: Mapping[str, torch.Tensor], *, strict: bool) -> None:
    """Load unsharded tensors into a student or its shards."""
    held = student.state_dict()
    placed = {name: held_as(value, held[name]) if name in held else value for name, value in tensors.items()}
    student.load_state_dict(placed, strict=strict)


def full_norm(norm: torch.Tensor) -> torch.Tensor:
    """A norm over all processes, on the device."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_student_of(student: Student) -> Student:
    """A copy of an unsharded student on the host, to save checkpoints with; its values do not matter."""
    return copy.deepcopy(student).cpu().eval().requires_grad_(False)
