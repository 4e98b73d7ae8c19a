"""The text projection from a small hub on this machine: what is fetched of the transformer, and what is refused."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from models.hub_tensor import read_tensor
from models.teacher_folder import find_teacher
from storage_schemas.errors import BadTeacher
from tests.models.small_hub import COMMIT, NAME, run_apart, serve

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ASK = """
import json, sys
from models.context_projection import find_context_projection
from storage_schemas.errors import BadTeacher
from storage_schemas.manifest import Teacher
recorded = Teacher.model_validate_json(open(sys.argv[1]).read())
try:
    found = find_context_projection(sys.argv[2], recorded)
    print(json.dumps([found.source, str(found.context_ID.dtype), found.context_ID.tolist()]))
except BadTeacher as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, dev_teacher) -> Path:
    """The random teacher, its transformer in three files."""
    folder = tmp_path_factory.mktemp("teacher") / "sharded"
    shutil.copytree(dev_teacher, folder)
    (whole,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    index: dict[str, str] = {}
    for number in range(3):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        keys = sorted(tensors)[number::3]
        save_file({key: tensors[key] for key in keys}, folder / "transformer" / name)
        index |= dict.fromkeys(keys, name)
    (folder / "transformer" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def file(teacher) -> str:
    """The file of the transformer that holds the projection, by its path in the repository."""
    index = json.loads((teacher / "transformer" / INDEX).read_bytes())
    return f"transformer/{index['weight_map']['context_embedder.weight']}"


@pytest.fixture(scope="module")
def expected(teacher, file) -> list:
    with safe_open(teacher / file, framework="pt") as tensors:
        return [NAME, "torch.float32", tensors.get_tensor("context_embedder.weight").float().tolist()]


@pytest.fixture(scope="module")
def recorded(teacher, tmp_path_factory) -> Path:
    identity = find_teacher(str(teacher), ("transformer",)).identity(text_length=12)
    path = tmp_path_factory.mktemp("recorded") / "teacher.json"
    path.write_text(identity.model_dump_json())
    return path


def ask(recorded: Path, name: str, home: Path, **environment: str) -> str | list:
    return json.loads(run_apart(ASK, str(recorded), name, home=home, **environment))


def test_of_the_transformer_one_tensor_is_fetched(tmp_path, teacher, file, recorded, expected):
    with serve(teacher) as (hub, sent):
        assert ask(recorded, f"{NAME}@v1", tmp_path, HF_ENDPOINT=hub) == expected
    data = (teacher / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensor = load_file(teacher / file)["context_embedder.weight"]
    reads = [count for name, count in sent if name == file]
    assert reads == [8, length, tensor.numel() * tensor.element_size()] and sum(reads) < len(data) / 4
    others = {name for name, _ in sent if name}
    assert others == {file, "model_index.json", "transformer/config.json", f"transformer/{INDEX}"}


def test_a_file_that_was_downloaded_before_is_read_without_the_hub(tmp_path, teacher, file, recorded, expected):
    with serve(teacher) as (hub, sent):
        assert ask(recorded, NAME, tmp_path, HF_ENDPOINT=hub) == expected
        said = ask(recorded, f"{NAME}@{COMMIT}", tmp_path, HF_HUB_OFFLINE="1")
        way_out = f"hf download {NAME} {file} --revision {COMMIT}"
        assert said == (
            f"context_embedder.weight could not be read from {file} of {NAME}@{COMMIT} (OfflineModeIsEnabled): check "
            f"the network, or fetch the file with `{way_out}`"
        )
        _, *arguments = way_out.split()
        command = f"from huggingface_hub.cli.hf import main; import sys; sys.argv[1:] = {arguments}; main()"
        run_apart(command, home=tmp_path, HF_ENDPOINT=hub)
    assert sent[-1] == (file, (teacher / file).stat().st_size)
    assert ask(recorded, f"{NAME}@{COMMIT}", tmp_path, HF_HUB_OFFLINE="1") == expected


def test_a_file_of_which_the_hub_states_no_sha256_is_fetched_whole(tmp_path, teacher, file, recorded, expected):
    with serve(teacher, large=".nothing") as (hub, sent):
        assert ask(recorded, NAME, tmp_path, HF_ENDPOINT=hub) == expected
    assert [count for name, count in sent if name == file] == [(teacher / file).stat().st_size]
    assert not [name for name, _ in sent if name.endswith(".safetensors") and name != file]


def test_of_another_model_nothing_is_read(tmp_path, teacher, file, recorded):
    shutil.copytree(teacher, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / file)
    tensors["context_embedder.weight"] += 1
    save_file(tensors, tmp_path / "other" / file)
    was = json.loads(recorded.read_text())["weights"][file][:16]
    with serve(tmp_path / "other") as (hub, sent):
        said = ask(recorded, NAME, tmp_path, HF_ENDPOINT=hub)
    assert file not in {name for name, _ in sent}
    assert re.fullmatch(
        rf"{file} of {NAME}@{COMMIT} has sha256 \w{{16}}, the cache was recorded with {was}: another model; give the "
        rf"recorded one with --backbone",
        said,
    )


def test_a_server_that_knows_no_ranges_is_one_line(tmp_path, teacher, file, recorded):
    with serve(teacher, knows_ranges=False) as (hub, _):
        said = ask(recorded, NAME, tmp_path, HF_ENDPOINT=hub)
    assert said.startswith(f"context_embedder.weight could not be read from {file} of {NAME}@{COMMIT} (ValueError): ")


def test_a_file_that_the_index_names_and_the_hub_has_not_is_one_line(tmp_path, teacher, file, recorded):
    shutil.copytree(teacher, tmp_path / "less")
    (tmp_path / "less" / file).unlink()
    with serve(tmp_path / "less") as (hub, _):
        said = ask(recorded, NAME, tmp_path, HF_ENDPOINT=hub)
    assert said.startswith(f"context_embedder.weight could not be read from {file} of {NAME}@{COMMIT} (FileNotFound")


TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.int64),
    "empty": torch.zeros(0, 5),
}


@pytest.mark.parametrize("key", TENSORS)
def test_each_tensor_of_a_file_is_the_librarys(key):
    data = save(TENSORS, metadata={"format": "pt"})
    found = read_tensor(io.BytesIO(data), len(data), key)
    assert found.dtype == TENSORS[key].dtype and torch.equal(found, TENSORS[key])


@given(st.integers(0, len(save(TENSORS)) - 1), st.binary(min_size=1, max_size=9), st.booleans())
def test_a_damaged_file_is_an_error_that_is_caught_or_the_tensor(at, damage, cut):
    data = save(TENSORS)
    damaged = data[:at] if cut else data[:at] + damage + data[at + len(damage) :]
    try:
        assert isinstance(read_tensor(io.BytesIO(damaged), len(damaged), "a"), torch.Tensor)
    except (ValueError, KeyError, TypeError, SafetensorError):
        assert damaged != data


def test_a_local_folder_is_read_as_before(teacher, recorded, file, expected):
    from models.context_projection import find_context_projection
    from storage_schemas.manifest import Teacher

    identity = Teacher.model_validate_json(recorded.read_text())
    found = find_context_projection(str(teacher), identity)
    assert (found.source, found.context_ID.tolist()) == (str(teacher), expected[2])
    with pytest.raises(BadTeacher, match=rf"{teacher}/{file} has sha256 \w{{16}}, the cache was recorded with None: an"):
        find_context_projection(str(teacher), identity.model_copy(update={"weights": {}}))
