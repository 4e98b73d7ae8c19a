"""Captions of LAION-Aesthetics out of real Parquet files and data sets."""

import tracemalloc

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.cache_builder.prompts.laion import laion_captions
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Silent
from tests.commands.test_cli import secondcast

# Rows of the metadata's form: a repeated caption (white space does not count), a low score, none, no caption.
ROWS = {
    "URL": ["u"] * 7,
    "TEXT": ["a red car", "a\nblue  bird", "a  red car", "noise", "unknown", " ", "an old oak"],
    "similarity": [0.3] * 7,
    "AESTHETIC_SCORE": [6.5, 7.25, 9.0, 6.49, None, 7.0, 6.75],
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parquet.write_table(pa.table(ROWS), tmp_path / "m.parquet", row_group_size=2)


def captions(source, *, min_score=6.5, num_prompts=None):
    return laion_captions(PromptSource.of(str(source)), min_score=min_score, num_prompts=num_prompts, bar=Silent())


def test_distinct_captions_of_a_sufficient_score_are_kept_in_their_order():
    found = captions("m.parquet")
    assert found.texts == ["a red car", "a\nblue  bird", "an old oak"]
    assert (found.rows, found.below, found.unscored, found.empty, found.repeated) == (7, 1, 1, 1, 1) and found.whole
    assert captions("m.parquet", min_score=7.0).texts == ["a\nblue  bird", "a  red car"]


def test_a_number_of_captions_ends_the_reading(tmp_path):
    found = captions("m.parquet", num_prompts=2)
    assert found.texts == ["a red car", "a\nblue  bird"] and (found.rows, found.whole) == (2, False)
    (tmp_path / "f").mkdir()
    parquet.write_table(pa.table(ROWS), tmp_path / "f/0.parquet")
    (tmp_path / "f/1.parquet").write_bytes(b"damaged, and not read")
    assert len(captions("f", num_prompts=2).texts) == 2
    with pytest.raises(PromptsError, match=r"f/1.parquet cannot be read as Parquet"):
        captions("f")


def test_a_folder_is_read_in_the_order_of_its_names_and_a_data_set_like_its_files(tmp_path):
    (tmp_path / "f").mkdir()
    for name, text in (("1.parquet", "second"), ("0.parquet", "first")):
        parquet.write_table(pa.table({"aesthetic": [8], "caption": [text]}), tmp_path / "f" / name)
    assert captions("f").texts == captions("hf:f").texts == ["first", "second"]
    Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert captions("hf:saved").texts == captions("m.parquet").texts


def test_memory_grows_with_what_is_kept_and_not_with_what_is_read(tmp_path):
    rows = 40_000
    table = {"TEXT": [f"caption number {n} " + "x" * 200 for n in range(rows)], "AESTHETIC_SCORE": [5.0] * rows}
    table["AESTHETIC_SCORE"][-1] = 7.0
    parquet.write_table(pa.table(table), tmp_path / "large.parquet", row_group_size=1024)
    total_bytes = sum(map(len, table["TEXT"]))
    tracemalloc.start()
    try:
        assert len(captions("large.parquet").texts) == 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A batch is a fortieth of the rows; Python's objects of a row are larger than its text.
    assert peak_bytes < total_bytes / 4


def test_the_command_writes_what_a_build_reads_and_counts_what_it_skipped(tmp_path, capsys):
    code, said, heard = secondcast("prompts", "laion", "m.parquet", "l.jsonl", capsys=capsys)
    assert (code, heard) == (0, "")
    assert said == (
        "l.jsonl: 3 distinct captions of 7 rows (1 with a lower score, 1 without one, 1 empty and 1 repeated skipped)\n"
    )
    read = read_prompts(["l.jsonl"], limit=None)
    assert [(text.text, text.sources) for text in read.texts] == [
        (text, ("laion",)) for text in captions("m.parquet").texts
    ]
    code, said, _ = secondcast("prompts", "laion", "m.parquet", "two.jsonl", "--num-prompts", 2, "-q", capsys=capsys)
    assert code == 0 and said.startswith("two.jsonl: 2 distinct captions of 2 rows, the first of the source (0 with ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nix.parquet", "l.jsonl"], "no nix.parquet: expected a Parquet file, a folder of them, or hf:NAME"),
        (["empty", "l.jsonl"], "empty has no .parquet file: expected the metadata of LAION-Aesthetics"),
        (["m.parquet", "l.txt"], "l.txt has the suffix '.txt', expected .jsonl: a build goes by the suffix"),
        (["m.parquet:limit=3", "l.jsonl"], "SOURCE is m.parquet:limit=3: name=, limit= and repeat= only apply to b"),
        (
            ["m.parquet:column=x", "l.jsonl"],
            "m.parquet has no column 'x': found URL, TEXT, similarity, AESTHETIC_SCORE",
        ),
        (["plain.parquet", "l.jsonl"], "plain.parquet has the columns TEXT and none of aesthetic_score, aesthetic: "),
        (["odd.parquet", "l.jsonl"], "odd.parquet row 1 has the score 'high', expected a number"),
        (
            ["m.parquet", "l.jsonl", "--min-score", "11"],
            "m.parquet has no caption with a score of at least 11 in 7 row",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(words, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    parquet.write_table(pa.table({"TEXT": ["a"]}), tmp_path / "plain.parquet")
    parquet.write_table(pa.table({"TEXT": ["a"], "aesthetic": ["high"]}), tmp_path / "odd.parquet")
    code, said, heard = secondcast("prompts", "laion", *words, capsys=capsys)
    assert (code, said) == (1, "") and heard.startswith(f"secondcast: {message}") and heard.count("\n") == 1, heard
    assert not (tmp_path / "l.jsonl").exists()
