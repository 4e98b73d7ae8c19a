"""The ways to hold the frozen transformer that full_scale.py compares: what is added here is measured there."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

from benchmarks.random_teacher import Scale, random_transformer
from models.streaming import stream_blocks


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to hold the transformer: prepare(scale, device, resident blocks).

    recomputes: the forward pass of each block once more in the backward pass. streams: as many blocks as there is room
    for are resident.
    """

    prepare: Callable[[Scale, torch.device, int], FluxTransformer2DModel]
    recomputes: bool
    streams: bool = False


def plain(scale: Scale, device: torch.device, resident: int) -> FluxTransformer2DModel:
    return random_transformer(scale, device)


def checkpointed(scale: Scale, device: torch.device, resident: int) -> FluxTransformer2DModel:
    model = random_transformer(scale, device)
    model.enable_gradient_checkpointing()
    return model


def streamed(scale: Scale, device: torch.device, resident: int) -> FluxTransformer2DModel:
    model = random_transformer(scale, device, home=torch.device("cpu"))
    return stream_blocks(model, device=device, resident=resident).transformer


def fsdp2(scale: Scale, device: torch.device, resident: int) -> FluxTransformer2DModel:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = checkpointed(scale, device, resident)
    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    for module in (*model.transformer_blocks, *model.single_transformer_blocks, model):
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))
    return model


@contextmanager
def process_group(device: torch.device) -> Iterator[Any]:
    """A group of this process alone, without which FSDP2 does not run."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            # Of what would go wrong if a block's output were changed in place, which FLUX does not.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            yield
    finally:
        dist.destroy_process_group()


# A modulation table, quantised weights and compiled blocks are further entries, alone and with one another.
OFFLINE = {
    "plain": Mode(prepare=plain, recomputes=False),
    "checkpointed": Mode(prepare=checkpointed, recomputes=True),
    "streamed": Mode(prepare=streamed, recomputes=True, streams=True),
    "fsdp2": Mode(prepare=fsdp2, recomputes=True),
}
ONLINE = {
    "online": OFFLINE["plain"],
    "online, checkpointed": OFFLINE["checkpointed"],
}
