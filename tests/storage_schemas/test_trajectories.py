"""A cache as a sequence of trajectories, which reads what is asked for."""

import numpy as np
import pytest

from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.reader import Cache
from tests.storage_schemas.caches import (
    CHANNELS,
    STEPS,
    TOKENS,
    begin,
    commit,
    some_prompts,
    write_cache,
    write_keyed_cache,
)


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
@pytest.mark.parametrize("latents", ["derived", "stored"])
def test_an_item_has_what_the_cache_reads(tmp_path, format, latents):
    write_cache(tmp_path / "cache", format=format, latents=latents, samples_per_prompt=2)
    cache = Cache.open(tmp_path / "cache")
    assert len(cache.trajectories) == len(cache) == 12
    for index, item in enumerate(cache.trajectories):
        recorded, prompt = cache.trajectory(index), cache.prompts[index % 6]
        assert (item.index, item.key, item.sample_index) == (index, recorded.key, index // 6)
        assert (item.prompt, item.sources, item.held_out) == (prompt.text, ("made-up",), prompt.held_out)
        assert (item.guidance, item.sigmas) == (recorded.guidance, (1.0, 0.75, 0.4, 0.0))
        for name in ("noise_SC", "hidden_states_KSC", "velocity_KSC", "final_latent_SC"):
            assert getattr(item, name).tobytes() == getattr(recorded, name).tobytes()
        assert item.velocity_KSC.shape == (STEPS, TOKENS, CHANNELS)
        assert np.array_equal(item.embedding_TD, cache.embedding(index % 6))
        assert item.conditioning.keys() == {"pooled_projections"}


def test_positions_count_what_is_committed_and_slices_are_sequences(tmp_path):
    write_keyed_cache(tmp_path / "cache", some_prompts(10), leave_out=(("trajectories", 1),))
    trajectories = Cache.open(tmp_path / "cache").trajectories
    assert [item.index for item in trajectories] == [0, 1, 2, 3, 8, 9]
    assert [item.index for item in trajectories[3:5][::-1]] == [8, 3] and trajectories[-1].index == 9
    assert trajectories[1:][0].prompt == "prompt number 1"
    with pytest.raises(IndexError):
        trajectories[6]


def test_prompts_are_listed_without_reading_arrays(tmp_path):
    write_cache(tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("velocity/c/**/*"):
        file.unlink(missing_ok=True) if file.is_file() else None
    assert [item.prompt for item in cache.trajectories] == [f"prompt number {number}" for number in range(6)]
    assert repr(cache.trajectories[5]).endswith("prompt='prompt number 5')")
    with pytest.raises(Exception, match="velocity"):
        _ = cache.trajectories[5].velocity_KSC


def test_a_cache_without_embeddings_has_the_rest(tmp_path):
    writer = begin(tmp_path / "cache", embeddings="none")
    for shard in writer.missing("trajectories"):
        commit(writer, shard)
    item = Cache.open(tmp_path / "cache").trajectories[2]
    assert item.velocity_KSC.shape == (STEPS, TOKENS, CHANNELS)
    with pytest.raises(NotInCacheError, match="was built with --no-store-embeddings"):
        _ = item.embedding_TD
