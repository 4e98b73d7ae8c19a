"""TOML as users write it: any editor's UTF-8, and errors that name the file."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.toml_file import read_toml


@settings(max_examples=60, deadline=None)
@given(value=st.text(st.characters(exclude_characters="'\x00", exclude_categories=["Cs", "Cc"])), mark=st.booleans())
def test_a_file_reads_the_same_with_and_without_a_byte_order_mark(tmp_path_factory, value, mark):
    file = tmp_path_factory.mktemp("toml") / "a.toml"
    text = f"key = '{value}'\nsteps = 3\n"
    file.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    assert read_toml(file, what="file", expected="lines") == tomllib.loads(text) == {"key": value, "steps": 3}


@settings(max_examples=100, deadline=None)
@given(data=st.binary())
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("toml") / "a.toml"
    file.write_bytes(data)
    try:
        read_toml(file, what="file", expected="lines such as steps = 3")
    except SettingsError as error:
        assert str(error).startswith(f"{file} cannot be read as TOML (")
        assert str(error).endswith("expected lines such as steps = 3")


def test_what_is_missing_or_in_another_encoding_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"^no file nix\.toml for --config: expected lines$"):
        read_toml(tmp_path / "nix.toml", what="file nix.toml for --config", expected="lines")
    file = tmp_path / "latin.toml"
    file.write_bytes("key = 'é'".encode("latin-1"))
    with pytest.raises(SettingsError) as raised:
        read_toml(file, what="file", expected="lines")
    assert str(raised.value) == (
        f"{file} cannot be read as TOML (byte 7 is not UTF-8): save it as UTF-8; expected lines"
    )
