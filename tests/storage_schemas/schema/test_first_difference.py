"""Where two JSON values differ: the path names the place, and what is shown of both differs."""

import copy
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import SettingsMismatchError
from secondcast.storage_schemas.schema.comparing import check_same_settings
from secondcast.storage_schemas.schema.first_difference import differing_leaves, first_difference
from tests.storage_schemas.caches import some_manifest, some_prompts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
    max_leaves=8,
)


@pytest.mark.thorough
@settings(max_examples=150, deadline=None)
@given(one=VALUES, other=VALUES)
def test_values_that_differ_are_shown_as_different(one, other):
    leaves = list(differing_leaves(one, other, "field"))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    if same:
        assert not leaves and first_difference(one, other, "field").one == first_difference(one, other, "field").other
    # What is absent counts as null, in dicts and at the end of lists: nothing else may pass for equal.
    for leaf in leaves:
        assert leaf.path.startswith("field") and leaf.one != leaf.other


@settings(max_examples=100, deadline=None)
@given(beginning=st.text(max_size=400), one=st.text(max_size=300), other=st.text(max_size=300))
def test_long_texts_are_cut_around_the_place_where_they_differ(beginning, one, other):
    assume(one != other)
    found = first_difference(beginning + one, beginning + other, "source")
    assert found.one != found.other and max(len(found.one), len(found.other)) <= 166


@pytest.mark.thorough
@settings(max_examples=100, deadline=None)
@given(data=st.data(), value=VALUES.filter(lambda value: isinstance(value, (list, dict)) and value))
def test_the_path_leads_to_the_value_that_was_changed(data, value):
    changed, path = copy.deepcopy(value), "field"
    at = changed
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        path += f".{key}" if isinstance(at, dict) else f"[{key}]"
        if not isinstance(at[key], (list, dict)) or not at[key]:
            break
        at = at[key]
    at[key] = "changed\x00"
    (leaf,) = differing_leaves(value, changed, "field")
    # A short list of numbers and strings is shown whole.
    assert leaf.path == path or (leaf.path == path[: path.rindex("[")] and leaf.one[0] == leaf.other[0] == "[")


@pytest.mark.parametrize(
    ("one", "other", "path", "shown"),
    [
        ({"steps": 4}, {"steps": 5}, "sampling.steps", ("4", "5")),
        ([1.0, 0.5], [1.0, 0.25], "sampling", ("[1.0,0.5]", "[1.0,0.25]")),
        ([*range(99), 1], [*range(99), 2], "sampling[99]", ("1", "2")),
        ([*range(99)], [*range(99), 2], "sampling[99]", ("null", "2")),
        ({"a": [{"n": "x"}]}, {"a": [{"n": "y"}]}, "sampling.a[0].n", ('"x"', '"y"')),
        ({"a": 1}, {}, "sampling.a", ("1", "null")),
    ],
)
def test_paths_read_as_a_user_would_write_them(one, other, path, shown):
    found = first_difference(one, other, "sampling")
    assert (found.path, (found.one, found.other)) == (path, shown)


def test_the_refusal_after_an_extension_names_the_segment_and_its_field():
    prompts = some_prompts(4)
    first = some_manifest(prompts)
    more = first.prompts.segments[0].model_copy(update={"samples_per_prompt": 2})
    other = first.model_copy(update={"prompts": first.prompts.model_copy(update={"segments": (more,)})})
    with pytest.raises(SettingsMismatchError) as raised:
        check_same_settings(other, first, "c")
    assert str(raised.value) == (
        "c was built with prompts.segments[0].samples_per_prompt = 2, requested 1: the order of all trajectories "
        "depends "
        "on it; give the original options, or another folder; `secondcast build --extend` adds prompts or "
        "samples to a cache, and is required for a cache that was extended"
    )
