"""One text, one id."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import NotInCache
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import Prompt, encode_prompts, is_held_out, normalised, prompt_id
from tests.storage_schemas.caches import some_prompts, write_cache


def test_the_id_of_a_text_is_pinned():
    # Every cache ever built depends on it: do not edit.
    assert prompt_id("a red car") == "436297766fa4f20df4b8539ee29b6310"


def test_a_text_has_one_id_in_either_unicode_form():
    assert prompt_id("café") == prompt_id("cafe\u0301") == prompt_id(" café\n")


def test_about_two_in_a_hundred_are_held_out_and_always_the_same():
    held = [is_held_out(prompt_id(f"text {i}")) for i in range(10_000)]
    assert 150 < sum(held) < 250
    assert held == [is_held_out(prompt_id(f"text {i}")) for i in range(10_000)]


@given(st.lists(st.text(min_size=1).filter(lambda t: t.strip()), min_size=1, max_size=5))
def test_offsets_lead_to_every_line_whatever_the_text(texts):
    prompts = [
        Prompt(id=prompt_id(t), text=normalised(t), sources=("s",), token_ids=(1,)) for t in texts if normalised(t)
    ]
    lines, offsets = encode_prompts(prompts)
    table = np.frombuffer(offsets, dtype="<u8")
    assert table[-1] == len(lines)
    assert [lines[a:b].count(b"\n") for a, b in itertools.pairwise(table)] == [1] * len(prompts)


def test_a_prompt_is_found_by_its_text(tmp_path):
    write_cache(tmp_path / "c")
    prompts = Cache.open(tmp_path / "c").prompts
    assert prompts.find("prompt number 4") == 4
    assert prompts[-1] == some_prompts(6)[-1] == list(prompts)[-1]
    with pytest.raises(NotInCache, match="no prompt 'prompt number 99'"):
        prompts.find("prompt number 99")
