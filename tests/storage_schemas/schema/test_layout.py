"""Segments: sample before prompt, no shard of two segments, N in all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Segment


@st.composite
def segments(draw):
    size = draw(st.integers(1, 7))
    first = Segment(
        first_prompt=0,
        prompts=draw(st.integers(1, 9)),
        first_sample=0,
        samples_per_prompt=draw(st.integers(1, 3)),
        shard_size=size,
    )
    more_prompts = Segment(
        first_prompt=first.prompts,
        prompts=draw(st.integers(1, 9)),
        first_sample=0,
        samples_per_prompt=first.samples_per_prompt,
        shard_size=size,
    )
    more_samples = Segment(
        first_prompt=0,
        prompts=first.prompts,
        first_sample=first.samples_per_prompt,
        samples_per_prompt=2,
        shard_size=size,
    )
    return draw(
        st.sampled_from([(first,), (first, more_prompts), (first, more_samples), (first, more_samples, more_prompts)])
    )


@given(segments())
def test_every_trajectory_has_one_place_and_every_place_one_trajectory(parts):
    layout = Layout(parts)
    assert len(layout) == sum(g.prompts * g.samples_per_prompt for g in parts)
    places = [layout.place(i) for i in range(len(layout))]
    assert len({(p.shard, p.row) for p in places}) == len(places)
    assert len({(p.prompt, p.sample_index) for p in places}) == len(places)
    for shard in layout.trajectories:
        inside = [layout.place(i) for i in range(shard.first, shard.first + shard.rows)]
        assert [(p.shard, p.row) for p in inside] == [(shard.shard, row) for row in range(shard.rows)]


@pytest.mark.thorough
@given(segments())
def test_every_prompt_has_one_embedding(parts):
    layout = Layout(parts)
    count = max(g.first_prompt + g.prompts for g in parts)
    assert sum(s.rows for s in layout.embeddings) == count
    assert len({layout.embedding_place(i) for i in range(count)}) == count


@given(segments())
def test_shards_follow_one_another_and_are_found_by_what_they_hold(parts):
    layout = Layout(parts)
    for shards in (layout.trajectories, layout.embeddings):
        assert shards[:] == list(shards) == [shards[i - len(shards)] for i in range(len(shards))]
        assert [shard.shard for shard in shards] == list(range(len(shards)))
        items = [item for shard in shards for item in range(shard.first, shard.first + shard.rows)]
        assert items == list(range(shards.items))
        assert all(shards.holding(item).shard == shard.shard for shard in shards for item in (shard.first,))
        for outside in (-1, shards.items):
            with pytest.raises(IndexError):
                shards.holding(outside)


def test_trajectories_go_by_sample_then_prompt():
    layout = Layout((Segment(first_prompt=0, prompts=3, first_sample=0, samples_per_prompt=2, shard_size=4),))
    assert [(layout.place(i).sample_index, layout.place(i).prompt) for i in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
