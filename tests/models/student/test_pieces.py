"""Tokenizers of one size are distinguished by their pieces, in every kind of file that has them."""

import io
import json
import re

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models
from transformers import T5TokenizerFast

from secondcast.models.student.pieces import check_same_pieces
from secondcast.storage_schemas.errors import StudentError

FIX = "give another"


def bpe(*pieces: str, added: tuple[str, ...] = ()) -> bytes:
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.add_tokens(list(added))
    return tokenizer.to_str().encode()


def write(folder, **files: bytes) -> str:
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def spiece() -> bytes:
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red dog and a blue car", "two cats on the bench"]), model_writer=written,
        vocab_size=22, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def test_other_pieces_under_the_same_ids_are_refused_with_the_first_of_them(tmp_path):
    source = write(tmp_path, tokenizer_json=bpe("a", "c", "b"))
    message = (
        f"the tokenizer of {source} has the piece 'c' as token id 1, expected 'b', that of the teacher, whose token "
        f"ids the student reads: {FIX}"
    )
    with pytest.raises(StudentError, match=f"^{re.escape(message)}$"):
        check_same_pieces(source, {"tokenizer.json": bpe("a", "b", "c")}, fix=FIX)


def test_files_that_differ_in_other_things_than_their_pieces_are_accepted(tmp_path):
    source = write(tmp_path, tokenizer_json=bpe("a", "b", "c", added=("<think>",)))
    check_same_pieces(source, {"tokenizer.json": bpe("a", "b", "c", added=("<tool>", "<end>"))}, fix=FIX)
    vocabulary = json.dumps({"a": 0, "b": 1, "c": 2}).encode()
    check_same_pieces(source, {"vocab.json": vocabulary}, fix=FIX)
    with pytest.raises(StudentError, match="has the piece 'a' as token id 0, expected 'b'"):
        check_same_pieces(source, {"vocab.json": vocabulary.replace(b'"a": 0, "b": 1', b'"b": 0, "a": 1')}, fix=FIX)


def test_a_sentencepiece_model_is_compared_with_the_tokenizer_that_transformers_makes_of_it(tmp_path, spiece):
    source = write(tmp_path, spiece_model=spiece)
    made = T5TokenizerFast.from_pretrained(source)
    made.save_pretrained(tmp_path / "made")
    data = (tmp_path / "made/tokenizer.json").read_bytes()
    check_same_pieces(source, {"tokenizer.json": data}, fix=FIX)
    changed = json.loads(data)
    vocabulary = changed["model"]["vocab"]
    vocabulary[5], vocabulary[9] = vocabulary[9], vocabulary[5]
    with pytest.raises(StudentError, match=r"as token id 5, expected "):
        check_same_pieces(source, {"tokenizer.json": json.dumps(changed).encode()}, fix=FIX)


def test_equal_files_are_not_parsed_and_a_student_without_a_tokenizer_has_nothing_to_compare(tmp_path, spiece):
    check_same_pieces(write(tmp_path, spiece_model=b"any"), {"spiece.model": b"any", "tokenizer.json": b"{"}, fix=FIX)
    (tmp_path / "none").mkdir()
    check_same_pieces(str(tmp_path / "none"), {"spiece.model": spiece}, fix=FIX)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "spiece.model"])
def test_a_damaged_tokenizer_is_refused_by_its_file(tmp_path, spiece, name):
    (tmp_path / name).write_bytes(b"{\x00")
    with pytest.raises(StudentError, match=f"^{name} of {tmp_path} cannot be read .*: download it again$"):
        check_same_pieces(str(tmp_path), {"tokenizer.json": bpe("a")}, fix=FIX)
