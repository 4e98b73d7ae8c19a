"""A source as a user writes it: known keys from the right, the rest is the path; one line for what is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.cache_builder.prompts.sources import KEYS, PromptSource
from secondcast.cache_builder.settings import BuildSettings
from secondcast.storage_schemas.errors import PromptsError, SettingsError

WORDS = st.text(st.characters(exclude_characters=":=/.", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt", {"path": "a.txt"}),
        ("a.txt:limit=5:repeat=10", {"path": "a.txt", "limit": 5, "repeat": 10}),
        ("a:b=c.csv:column=the caption", {"path": "a:b=c.csv", "column": "the caption"}),
        (r"C:\a.txt:name=x=y", {"path": r"C:\a.txt", "name": "x=y"}),
        ("hf:org/set:split=train:config=en:revision=1f", {"path": "hf:org/set", "split": "train", "config": "en",
                                                          "revision": "1f"}),
        ("a.txt:limit=5:x=y", {"path": "a.txt:limit=5:x=y"}),
    ],
)  # fmt: skip
def test_known_keys_are_taken_from_the_right(text, expected):
    assert PromptSource.of(text) == PromptSource(**expected)


@given(path=WORDS, name=WORDS, limit=st.integers(1, 10**9), repeat=st.integers(1, 10_000))
def test_what_is_written_is_what_is_read(path, name, limit, repeat):
    source = PromptSource.of(f"{path}.txt:name={name}:limit={limit}:repeat={repeat}")
    assert source == PromptSource(path=f"{path}.txt", name=name, limit=limit, repeat=repeat)


@given(st.lists(st.sampled_from([*KEYS, ":", "=", "hf:", "a", ".csv", "1", "0", "\n", "é"]), max_size=12).map("".join))
def test_any_text_is_a_source_or_one_line(text):
    try:
        source = PromptSource.of(text)
    except PromptsError as error:
        assert text in str(error) or repr(text) in str(error) or "hf:NAME" in str(error)
    else:
        assert source.path and text.startswith(source.path)


def test_a_path_is_taken_as_it_is():
    assert PromptSource.of(Path("a.txt:limit=5")).path == "a.txt:limit=5"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x/colors_train.txt", "colors_train"),
        ("hf:org/set-1.5:limit=2", "set-1.5"),
        ("hf:x/y/", "y"),
        ("a:name=b", "b"),
        ("-", "stdin"),
        ("/dev/stdin:column=text", "stdin"),
        ("/dev/fd/63", "stdin"),
        ("/proc/self/fd/11", "stdin"),
        ("/dev/fd/63:name=b", "b"),
        ("./-", "-"),
    ],
)
def test_a_source_is_named_by_its_file_or_data_set_and_a_pipe_always_the_same(text, name):
    assert PromptSource.of(text).source_name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt:limit=x", "prompt source 'a.txt:limit=x' has limit=x, expected an integer from 1 to 10"),
        ("a.txt:limit=0", "limit=0, expected an integer from 1"),
        ("a.txt:limit=" + "9" * 5000, "expected an integer from 1"),
        ("a.txt:repeat=10001", "repeat=10001, expected an integer from 1 to 10000"),
        ("a.txt:repeat=2:limit=1:repeat=3", "has repeat= twice: omit one"),
        ("a.txt:name=", "has an empty name=: give a value"),
        ("a.txt:split=train", "a.txt has split=train, which only hf:NAME accepts: omit it"),
        ("a\udcff.txt", r"prompt source 'a\\udcff.txt': path: .*unable to parse raw data as a unicode string"),
        ("", "prompt source '': path: "),
    ],
)
def test_wrong_keys_are_refused_in_one_line(text, message):
    with pytest.raises(PromptsError, match=message) as error:
        PromptSource.of(text)
    assert "\n" not in str(error.value)


def test_settings_take_strings_paths_and_sources():
    settings = BuildSettings(prompts=("a.txt:limit=5", Path("b.txt"), PromptSource(path="c.txt", repeat=2)))
    assert settings.prompts == (
        PromptSource(path="a.txt", limit=5),
        PromptSource(path="b.txt"),
        PromptSource(path="c.txt", repeat=2),
    )
    with pytest.raises(PromptsError, match="limit=x, expected an integer"):
        BuildSettings.from_flags(prompts=("a.txt:limit=x",))
    with pytest.raises(SettingsError, match="--prompts"):
        BuildSettings.from_flags(prompts=())
