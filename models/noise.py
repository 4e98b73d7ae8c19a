"""Noise and guidance of a trajectory: functions of (seed, prompt id, sample index), the same on every machine.

torch's generators differ between CPUs; Philox is counter-based, so the order of drawing does not matter.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from secondcast.storage_schemas.schema.fields import Array


def _generator(purpose: str, seed: int, prompt_id: str, sample_index: int) -> np.random.Generator:
    name = f"{purpose}/{seed}/{prompt_id}/{sample_index}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def draw_noise(*, seed: int, prompt_id: str, sample_index: int, image_tokens: int, channels: int) -> Array:
    """x_0 as packed tokens, [S, C] float32, standard normal."""
    generator = _generator("noise", seed, prompt_id, sample_index)
    return generator.standard_normal((image_tokens, channels), dtype=np.float32)


def draw_guidance(values: Sequence[float], *, seed: int, prompt_id: str, sample_index: int) -> float:
    """One of the guidance values, uniformly at random."""
    return float(values[int(_generator("guidance", seed, prompt_id, sample_index).integers(len(values)))])
