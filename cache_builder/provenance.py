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


def changed_provenance(writer: CacheWriter, ours: dict[Kind, dict[str, Any]]) -> list[str]:
    """A line for each kind of shard of which some are there, some are missing, and ours would be made otherwise.

    ours: by kind what `provenance` gives here. The newest shard stands for all that are there.
    """
    records = writer.records()
    planned = {"embeddings": len(writer.layout.embeddings), "trajectories": len(writer.layout.trajectories)}
    lines = []
    for kind, now in ours.items():
        there = {shard: record.provenance for (found, shard), record in records.items() if found == kind}
        if not 0 < len(there) < planned[kind]:
            continue
        then = there[max(there)]
        changed = [f"{name} {then.get(name)} -> {now[name]}" for name in _SHAPES_BITS if then.get(name) != now[name]]
        if changed:
            lines.append(
                f"{writer.folder}: the rest of the {kind} is made otherwise than what is there ({', '.join(changed)}): "
                f"it goes on, but the same bytes are promised only where these agree"
            )
    return lines
