"""What a measurement of sensitivity is asked to take: its flags, and the prompts that are drawn. No torch."""

from typing import Literal

import numpy as np
from pydantic import Field

from models.memory_options import MemoryOptions
from models.noise import draw_order
from storage_schemas.errors import BadSettings, NotInCache
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import Plan


class SensitivitySettings(MemoryOptions):
    """The flags of a measurement.

    products: vector-Jacobian products per prompt; prompts: how many are drawn of those that training sees; steps: how
    many of the trajectory's, spread evenly; None: all. batch_size: rows (steps of prompts) that go through the
    transformer at once. part_size: prompts that are put on disk together: what a kill loses at most. The rest: see
    MemoryOptions; "cache": as recorded.
    """

    products: int = Field(default=4, ge=1)
    prompts: int = Field(default=1024, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    part_size: int = Field(default=32, ge=1)
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    attention_backend: str | None = None
    seed: int = Field(default=0, ge=0)

    def plan(self, cache: Cache) -> Plan:
        """What is measured on a cache; NotInCache where it has nothing to measure on."""
        manifest = cache.manifest
        dtype = manifest.sampling.dtype if self.backbone_dtype == "cache" else self.backbone_dtype
        digests = manifest.digests()
        return Plan(
            teacher_digest=digests["teacher"],
            sampling_digest=digests["sampling"],
            products=self.products,
            seed=self.seed,
            steps=_spread_steps(self.steps, manifest.sampling.steps, cache),
            dtype=dtype,
            quantize=self.quantize,
            part_size=self.part_size,
            prompt_ids=tuple(_drawn(cache, self.prompts, self.seed)),
        )


def _spread_steps(count: int | None, steps: int, cache: Cache) -> tuple[int, ...]:
    if count is not None and count > steps:
        raise BadSettings(f"--steps is {count}, the trajectories of {cache.folder} have {steps}: give at most {steps}")
    return tuple(sorted({round(at) for at in np.linspace(0, steps - 1, steps if count is None else count)}))


def _drawn(cache: Cache, count: int, seed: int) -> list[str]:
    """Ids of prompts that training sees, of which a trajectory is there, in an order drawn by the seed."""
    if cache.manifest.sampling.storage.embeddings == "none":
        raise BadSettings(
            f"{cache.folder} was built with --embeddings none: sensitivity is the derivative at the teacher's "
            f"embeddings; build with --embeddings stored"
        )
    firsts = first_trajectories(cache)
    if not firsts:
        raise NotInCache(
            f"{cache.folder} has no committed trajectory of a prompt that training sees: give the build command again"
        )
    ids = sorted(firsts)
    return [ids[place] for place in draw_order(ids, seed=seed)[:count]]


def first_trajectories(cache: Cache) -> dict[str, int]:
    """Of each prompt that training sees, by its id, the first trajectory that is committed."""
    prompts = list(cache.prompts)
    found: dict[str, int] = {}
    for index in cache.indices():
        prompt = prompts[cache.layout.place(int(index)).prompt]
        if not prompt.held_out:
            found.setdefault(prompt.id, int(index))
    return found
