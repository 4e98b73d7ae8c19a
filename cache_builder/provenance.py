"""How a shard was made: recorded in each commit, never refused."""

import platform
from importlib.metadata import version
from typing import Any

import torch


def provenance(*, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Library versions, device, attention backend, batch size, threads."""
    return {
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "attention": "sdpa",
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
    }
