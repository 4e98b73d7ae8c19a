"""Provenance of shards: recorded in each commit, never validated."""

import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from secondcast.models.attention import recorded_attention
from secondcast.models.memory.quantized import quantizer
from secondcast.models.weights.checked_loading import cast_from
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.recording import Quantization
from secondcast.storage_schemas.writer import CacheWriter

# For records from before the batch size was recorded.
DEFAULT_BATCH_SIZE = 16

SHAPES_BITS = (
    "device", "attention", "attention_kernel", "modulation", "torch", "cudnn", "diffusers", "transformers", "quantizer",
    "batch_size", "threads",
)  # fmt: skip
"""Provenance fields on which the last bits of a shard depend."""


# Older records lack them, and before the transformer is loaded its kernel is unknown.
_NOT_ALWAYS_KNOWN = ("attention_kernel", "cudnn")


def provenance(
    *,
    device: torch.device,
    batch_size: int,
    attention: str | None = None,
    attention_kernel: str | None = None,
    modulation: str | None = None,
    quantize: Quantization = "none",
    networks: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:
    """Library versions, device, attention backend and kernel, quantizer, batch size and threads of a shard.

    attention: None for the default backend.
    attention_kernel: the kernel of that backend, where it is known.
    modulation: what replaces the transformer's modulation weights; recorded only if something does.
    quantize: `quantizer` is recorded only if weights are quantized.
    networks: `cast_from` is recorded only if their files have a dtype other than the one they were loaded in.
    """
    made_by, stored = quantizer(quantize), cast_from(*networks)
    return {
        **_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "attention": recorded_attention(attention),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        **({} if attention_kernel is None else {"attention_kernel": attention_kernel}),
        **({"cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}),
        **({} if modulation is None else {"modulation": modulation}),
        **({} if made_by is None else {"quantizer": made_by}),
        **({} if stored is None else {"cast_from": stored}),
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}


def recorded_batch_size(made: dict[str, Any]) -> int:
    """The batch size that the provenance of a shard states."""
    return int(made.get("batch_size", DEFAULT_BATCH_SIZE))


def changes(was: dict[str, Any], now: dict[str, Any], *, on_gpu: bool = False) -> list[str]:
    """Differences between two provenances that affect the last bits; on a GPU the host's threads do not matter."""
    names = [name for name in SHAPES_BITS if not (on_gpu and name == "threads")]
    names = [name for name in names if name not in _NOT_ALWAYS_KNOWN or (name in was and name in now)]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names if was.get(name) != now.get(name)]


def changed_provenance(writer: CacheWriter, ours: dict[Kind, dict[str, Any]]) -> list[str]:
    """A warning for each partly committed kind of shard whose missing shards would have another provenance.

    ours: current provenance by kind. It is compared with that of the newest committed shard.
    """
    records = writer.records()
    planned = {"embeddings": len(writer.layout.embeddings), "trajectories": len(writer.layout.trajectories)}
    lines = []
    for kind, now in ours.items():
        there = {shard: record.provenance for (found, shard), record in records.items() if found == kind}
        if not 0 < len(there) < planned[kind]:
            continue
        then = there[max(there)]
        if changed := changes(then, now):
            lines.append(
                f"{writer.folder}: the remaining {kind} are made with settings other than the committed ones "
                f"({', '.join(changed)}): the build resumes, but identical bytes are guaranteed only where these agree"
            )
    return lines
