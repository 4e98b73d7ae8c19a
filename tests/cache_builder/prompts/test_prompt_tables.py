"""Prompts of Parquet files and of Hugging Face data sets, by the real libraries."""

import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.storage_schemas.errors import PromptsError

ROOT = Path(__file__).resolve().parents[3]
TABLE = {"id": [1, 2, 3], "caption": ["a red car", None, "a dog"]}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def found(source):
    read = read_prompts([source], limit=None)
    return [text.text for text in read.texts], {name for text in read.texts for name in text.sources}, read.empty


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_parquet_is_read_by_whatever_text_type(tmp_path, kind):
    column = pa.array(TABLE["caption"], pa.string()).cast(kind)
    parquet.write_table(pa.table({"id": TABLE["id"], "caption": column}), tmp_path / "laion.parquet", row_group_size=2)
    assert found(tmp_path / "laion.parquet") == (["a red car", "a dog"], {"laion"}, 1)


def test_a_column_is_found_in_any_case_and_one_that_was_cut_wrongly_is_refused(tmp_path):
    parquet.write_table(pa.table({"URL": ["u"], "TEXT": ["a red car"]}), tmp_path / "laion.parquet")
    assert found(tmp_path / "laion.parquet")[0] == found(f"{tmp_path}/laion.parquet:column=text")[0] == ["a red car"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/train.csv").write_text("prompt;kind\na red car;colour\n")
    with pytest.raises(
        PromptsError, match=r"tables has the columns prompt;kind and none of prompt, text, caption: name"
    ):
        found(f"hf:{tmp_path}/tables")


def test_a_saved_data_set_is_read_with_or_without_splits(tmp_path):
    Dataset.from_dict(TABLE).save_to_disk(tmp_path / "plain")
    assert found(f"hf:{tmp_path}/plain") == (["a red car", "a dog"], {"plain"}, 1)
    DatasetDict({"train": Dataset.from_dict(TABLE), "test": Dataset.from_dict({"text": ["z"]})}).save_to_disk(
        tmp_path / "splits"
    )
    assert found(f"hf:{tmp_path}/splits:split=test:name=mine") == (["z"], {"mine"}, 0)
    with pytest.raises(PromptsError, match=r"splits has the splits train, test: name one with :split=NAME"):
        found(f"hf:{tmp_path}/splits")
    with pytest.raises(PromptsError, match=r"splits has no split 'val': found train, test"):
        found(f"hf:{tmp_path}/splits:split=val")
    with pytest.raises(PromptsError, match=r"plain has no split 'val': it has no splits"):
        found(f"hf:{tmp_path}/plain:split=val")


def test_a_folder_of_data_files_is_a_data_set(tmp_path):
    for name in ("tables", "lines"):
        (tmp_path / name).mkdir()
    parquet.write_table(pa.table(TABLE), tmp_path / "tables/part-0.parquet")
    (tmp_path / "lines/train.jsonl").write_text('{"caption": "a red car"}\n{"caption": "a dog"}\n')
    assert found(f"hf:{tmp_path}/tables") == (["a red car", "a dog"], {"tables"}, 1)
    assert found(f"hf:{tmp_path}/lines:limit=1") == (["a red car"], {"lines"}, 0)


def test_no_code_of_a_data_set_is_run(tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        PromptsError, match=r"evil cannot be loaded \(\w+: .*\): expected what save_to_disk wrote, or a"
    ):
        found(f"hf:{tmp_path}/evil")
    assert not (tmp_path / "ran").exists()


def test_wrong_columns_and_damage_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table(TABLE), file)
    with pytest.raises(PromptsError, match=r"a.parquet has no column 'text': found id, caption"):
        found(f"{file}:column=text")
    with pytest.raises(PromptsError, match=r"a.parquet row 1, column 'id', is int, expected text"):
        found(f"{file}:column=id")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        PromptsError, match=r"a.parquet cannot be read as Parquet \(.*\): expected a whole file"
    ) as error:
        found(file)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "source", "message"),
    [
        (
            "pyarrow",
            "a.parquet",
            "a.parquet is Parquet and pyarrow is not installed: pip install 'secondcast[datasets]'",
        ),
        (
            "datasets",
            "hf:a/b",
            "hf:a/b is a data set and datasets is not installed: pip install 'secondcast[datasets]'",
        ),
        (None, "hf:nobody/nothing", "no folder has that name; check the name, config= and revision=, and the"),
    ],
)
def test_what_is_not_installed_or_cannot_be_reached_is_one_line(tmp_path, blocked, source, message):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    block = f"sys.modules[{blocked!r}] = None; " if blocked else ""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {block}from secondcast import cli; cli.main()",
         "prompts", "count", source],
        cwd=tmp_path, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert message in done.stderr
