"""Caches of format version 1, written once and never again: every later reader gives the same records."""

from pathlib import Path

import pytest
import xxhash

from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache

FOLDER = Path(__file__).parent / "version_1"
# xxh3_128 over all records, as read when the caches were made. A reader that changes one of them is wrong.
RECORDS = {
    "zarr-none": "2244e5d0afdd9de3bb6faeafaf5e28f6",
    "zarr-lossless": "2d3a0f5976997a0d907bb6c2325145da",
    "webdataset-none": "2d3a0f5976997a0d907bb6c2325145da",
    "webdataset-lossless": "2d3a0f5976997a0d907bb6c2325145da",
    "webdataset-int8": "4b2e415016b7bad5187879be174e663c",
}


def digest_of(cache: Cache) -> str:
    state = xxhash.xxh3_128()
    for index in range(len(cache)):
        trajectory = cache.trajectory(index)
        prompt = cache.prompts[trajectory.prompt]
        told = (
            trajectory.key,
            trajectory.sample_index,
            trajectory.guidance,
            prompt.text,
            prompt.sources,
            prompt.token_ids,
        )
        state.update(repr(told).encode())
        for array in (trajectory.noise_SC, trajectory.velocity_KSC, trajectory.final_latent_SC):
            state.update(array.tobytes())
        state.update(trajectory.hidden_states_KSC.tobytes())
        state.update(cache.embedding(trajectory.prompt).tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("name", RECORDS)
def test_a_version_1_cache_reads_as_it_did(name):
    cache = Cache.open(FOLDER / name)
    assert cache.finished and len(cache) == 6
    assert digest_of(cache) == RECORDS[name]


@pytest.mark.parametrize("name", RECORDS)
def test_a_version_1_cache_is_whole(name):
    assert verify(FOLDER / name, Silent()).problems == ()
