"""A student's own tokenizer: FluxPipeline's ids, of any text, from any thread, from files that a student carries."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from secondcast.models.student.tokens import StudentTokens, portable, read_tokens
from secondcast.storage_schemas.errors import StudentError
from tests.models.student.encoders import FAMILIES, make_encoder_folder, rewrite_config


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("encoders") / "bert", "bert", weights=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("encoders") / "gpt2", "gpt2", weights=False)


def test_ids_are_padded_on_the_right_and_cut_with_the_end_token_kept(bert):
    tokens = read_tokens(str(bert), text_length=6)
    assert tokens.ids("a red dog").tolist() == [2, 5, 6, 11, 3, 0] and tokens.ids("a red dog").dtype == np.int64
    assert tokens.ids("a red dog and a car").tolist() == [2, 5, 6, 11, 18, 3]
    assert tokens.batch(["a red dog", ""]).tolist() == [[2, 5, 6, 11, 3, 0], [2, 3, 0, 0, 0, 0]]
    assert (tokens.pad_token_id, tokens.pad_is_end, tokens.text_length) == (0, False, 6)


@pytest.fixture(scope="module")
def ours_and_given(bert):
    return read_tokens(str(bert), text_length=8), AutoTokenizer.from_pretrained(bert)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_ids_of_any_text_are_those_of_the_tokenizer_that_was_given(ours_and_given, text):
    ours, given_one = ours_and_given
    expected = given_one(text, padding="max_length", max_length=8, truncation=True).input_ids
    assert ours.ids(text).tolist() == expected and len(expected) == 8


def test_a_tokenizer_without_pad_token_pads_with_its_end_and_its_files_say_so(gpt2, tmp_path):
    tokens = read_tokens(str(gpt2), text_length=5)
    assert tokens.pad_is_end and tokens.ids("").tolist() == [0] * 5
    for name, data in tokens.files.items():
        (tmp_path / name).write_bytes(data)
    assert json.loads(tokens.files["tokenizer_config.json"])["pad_token"] == "<|endoftext|>"
    assert read_tokens(str(tmp_path), text_length=5).files == tokens.files


def test_many_threads_get_the_ids_of_one(bert):
    tokens = read_tokens(str(bert), text_length=9)
    texts = [f"a red {thing} {number}" for thing in ("dog", "cat", "car") for number in range(60)]
    alone = [tokens.ids(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(read_tokens(str(bert), text_length=9).ids, texts)] == alone


def test_files_do_not_say_where_they_came_from(bert):
    files = read_tokens(str(bert), text_length=9).files
    assert not any(str(bert.parent).encode() in data for data in files.values())
    assert "local_files_only" not in json.loads(files["tokenizer_config.json"])


def test_a_tokenizer_that_cannot_be_had_is_refused(bert, gpt2, tmp_path):
    shutil.copytree(bert, tmp_path / "x")
    (tmp_path / "x/tokenizer.json").write_text("[")
    with pytest.raises(
        StudentError, match=r"the tokenizer of .*x cannot be read \(.*\), but a student that is not T5 needs"
    ):
        read_tokens(str(tmp_path / "x"), text_length=5)
    for file in (tmp_path / "x").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(StudentError, match=r"x has no tokenizer, but a student that is not T5 needs its own: put"):
        read_tokens(str(tmp_path / "x"), text_length=5)
    shutil.copytree(gpt2, tmp_path / "y")
    rewrite_config(tmp_path / "y", "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    with pytest.raises(
        StudentError, match=r"tokenizer of .*y has neither a pad token nor an end token to pad with: set"
    ):
        read_tokens(str(tmp_path / "y"), text_length=5)


def test_no_code_of_a_folder_is_run(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "x")
    rewrite_config(tmp_path / "x", "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (tmp_path / "x/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = None\n")
    try:
        read_tokens(str(tmp_path / "x"), text_length=5)
    except StudentError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_portable_tokenizer_has_no_form_of_version_5_alone_and_gives_the_same_ids(family, tmp_path):
    before = read_tokens(str(make_encoder_folder(tmp_path / "source", family, weights=False)), text_length=9)
    config = portable(before.files["tokenizer_config.json"])
    written = json.loads(config)
    # transformers 4 asks a list of extra special tokens for its keys, and knows no class TokenizersBackend.
    assert not isinstance(written.get("extra_special_tokens"), list)
    assert written["tokenizer_class"] != "TokenizersBackend" and "backend" not in written
    after = StudentTokens(before.files | {"tokenizer_config.json": config}, 9, where="here")
    texts = ["a red dog", "", "two cats, 3 [SEP] </s>"]
    assert after.batch(texts).tolist() == before.batch(texts).tolist()
    assert after.pad_token_id == before.pad_token_id
    assert portable(config) == config


def test_special_tokens_keep_their_names_in_a_portable_tokenizer():
    config = {"extra_special_tokens": ["<a>", "<b>"], "tokenizer_class": "T5Tokenizer", "é": 1}
    written = json.loads(portable(json.dumps(config).encode()))
    assert written == {"additional_special_tokens": ["<a>", "<b>"], "tokenizer_class": "T5Tokenizer", "é": 1}
    named = json.dumps({"extra_special_tokens": {"image_token": "<i>"}}, indent=3).encode()
    assert portable(named) == named
