"""How a shard was made: recorded in each commit, never refused."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from models.attention import recorded_attention
from storage_schemas.commits import Kind
from storage_schemas.writer import CacheWriter

# Of what provenance states, that on which bits depend.
_SHAPES_BITS = ("device", "attention", "torch", "batch_size", "threads")


def provenance(*, device: torch.device, batch_size: int, attention: str | None = None) -> dict[str, Any]:
    """Library versions, device, attention backend (None: the default), batch size, threads."""
    return {
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "attention": recorded_attention(attention),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
    }


def changed_provenance(writer: CacheWriter, kind: Kind, ours: dict[str, Any]) -> str | None:
    """What differs between us and whoever committed the newest shard of a kind, in a line; None if nothing does.

    Also None where no shard of the kind is there, or none is missing.
    """
    records = [record for (found, _), record in sorted(writer.records().items()) if found == kind]
    if not records or not writer.missing(kind):
        return None
    theirs = records[-1].provenance
    changed = [f"{name} {theirs.get(name)} -> {ours[name]}" for name in _SHAPES_BITS if theirs.get(name) != ours[name]]
    if not changed:
        return None
    return (
        f"{writer.folder}: the rest of the {kind} is made otherwise than what is there ({', '.join(changed)}): "
        f"it goes on, but the same bytes are promised only where these agree"
    )
