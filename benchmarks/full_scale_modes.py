"""The ways to hold the frozen transformer that full_scale.py compares: what is added here is measured there."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.random_teacher import Scale, random_transformer
from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.compiling import check_compiler
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.quantized import check_quantizer
from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.schema.manifest import Manifest, Quantization


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to hold the transformer: what Backbone.load would do with these options.

    like: the online mode that a step's time is compared with. streams: as many blocks are resident as there is room
    for. fsdp2: the blocks are given to PyTorch's FSDP2 instead, which has no option of ours; `options` count its FLOPs.
    """

    options: MemoryOptions
    like: str
    streams: bool = False
    fsdp2: bool = False

    def with_resident(self, resident: int | None) -> MemoryOptions:
        """The options with so many resident blocks; None where all are."""
        if not self.streams:
            return self.options
        return MemoryOptions(**self.options.model_dump() | {"gpu_blocks": resident or 0})


def _table(like: str, streams: bool = False, quantize: Quantization = "none", compiled: bool = False) -> Mode:
    """With a modulation table; checkpointed where the online mode is."""
    return Mode(
        options=MemoryOptions(
            modulation="precomputed",
            activation_checkpointing=int(like != "online"),
            quantize=quantize,
            compile=compiled,
        ),
        like=like,
        streams=streams,
    )


_CHECKPOINTED, _COMPILED = "online+checkpointed", "online+checkpointed+compiled"
_EXACT = {
    "": Mode(options=MemoryOptions(modulation="gpu"), like="online"),
    "checkpointed": Mode(options=MemoryOptions(modulation="gpu", activation_checkpointing=1), like=_CHECKPOINTED),
}
ONLINE = {
    "online": _EXACT[""],
    _CHECKPOINTED: _EXACT["checkpointed"],
    _COMPILED: Mode(options=MemoryOptions(modulation="gpu", activation_checkpointing=1, compile=True), like=_COMPILED),
}
OFFLINE = {
    "plain": _EXACT[""],
    "checkpointed": _EXACT["checkpointed"],
    "streamed": Mode(options=_EXACT["checkpointed"].options, like=_CHECKPOINTED, streams=True),
    "fsdp2": Mode(options=_EXACT["checkpointed"].options, like=_CHECKPOINTED, fsdp2=True),
    "table": _table("online"),
    "table+checkpointed": _table(_CHECKPOINTED),
    "table+streamed": _table(_CHECKPOINTED, streams=True),
    "table+checkpointed+compiled": _table(_COMPILED, compiled=True),
    "table+streamed+compiled": _table(_COMPILED, streams=True, compiled=True),
    "int8": _table(_CHECKPOINTED, quantize="int8"),
    "fp8": _table(_CHECKPOINTED, quantize="fp8"),
    "nf4": _table(_CHECKPOINTED, quantize="nf4"),
}
MODES = ONLINE | OFFLINE


def why_not(mode: Mode, scale: Scale, device: torch.device) -> str | None:
    """Why a mode cannot be run here: a package or a compiler is missing. None where it can."""
    try:
        check_quantizer(mode.options.quantize)
        # The other backends of torch.compile need no compiler.
        if mode.options.compile and scale.compiler == "inductor":
            check_compiler(device)
    except SecondcastError as error:
        return f"not run: {error}"
    return None


def prepare(
    mode: Mode,
    scale: Scale,
    device: torch.device,
    manifests: Iterable[Manifest],
    *,
    batch_rows: int,
    resident: int | None,
    home: torch.device,
) -> Backbone:
    """The random transformer, held in this way, for these caches; its geometry is that of the first one.

    home: where its weights lie before, as those lie on the host that `load` reads.
    """
    manifests = list(manifests)
    geometry, text_length = recorded_geometry(manifests[0].sampling), manifests[0].teacher.text_length
    transformer = random_transformer(scale, device, home=home)
    if mode.fsdp2:
        activation_checkpointing(transformer, mode.options.activation_checkpointing)
        _shard(transformer, device)
        # Parameters that FSDP2 holds lie elsewhere than where they compute.
        return Backbone(transformer, geometry, text_length=text_length, device=device)
    return Backbone.holding(
        transformer,
        geometry,
        text_length=text_length,
        device=device,
        options=mode.with_resident(resident),
        conditions=recorded_conditions(manifests, batch_rows=batch_rows),
        compiler=scale.compiler,
    )


def _shard(transformer: Any, device: torch.device) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    for module in (*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer):
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))


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
