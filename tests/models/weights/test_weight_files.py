"""Weight files: which ones are read, and one line for whatever else is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from secondcast.models.weights.files import (
    DIFFUSERS,
    TRANSFORMERS,
    CheckpointSource,
    StoredTensor,
    StoredWeights,
    holds_weights,
    stored_weights,
)
from secondcast.storage_schemas.errors import TeacherError

SOURCE = CheckpointSource(where="it", error=TeacherError, again="download it again")
ROOT = Path(__file__).resolve().parents[3]


def save(file: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def index(folder: Path, names, weight_map) -> None:
    (folder / names.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def said(folder: Path, names=TRANSFORMERS, **how) -> str:
    with pytest.raises(TeacherError) as caught:
        stored_weights(folder, names, SOURCE, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_shapes_and_dtypes_are_read_from_one_file_and_from_several(tmp_path):
    save(tmp_path / "a.safetensors", x=torch.ones(2, 3, dtype=torch.bfloat16))
    save(tmp_path / "b.safetensors", y=torch.tensor(1), z=torch.ones(4, dtype=torch.float8_e5m2))
    index(tmp_path, TRANSFORMERS, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})
    tensors = {
        "x": StoredTensor(shape=(2, 3), dtype="BF16"),
        "y": StoredTensor(shape=(), dtype="I64"),
        "z": StoredTensor(shape=(4,), dtype="F8_E5M2"),
    }
    assert stored_weights(tmp_path, TRANSFORMERS, SOURCE) == StoredWeights(tensors=tensors)
    assert stored_weights(tmp_path, TRANSFORMERS, SOURCE).dtypes == ["BF16", "F8_E5M2", "I64"]
    # Each library has its own rule for a folder with both.
    save(tmp_path / "model.safetensors", w=torch.ones(1))
    assert list(stored_weights(tmp_path, TRANSFORMERS, SOURCE).tensors) == ["w"]
    (tmp_path / TRANSFORMERS.index).rename(tmp_path / DIFFUSERS.index)
    (tmp_path / TRANSFORMERS.whole).rename(tmp_path / DIFFUSERS.whole)
    assert list(stored_weights(tmp_path, DIFFUSERS, SOURCE).tensors) == ["x", "y", "z"]


def test_an_index_without_its_files_is_an_incomplete_download_or_of_another_checkpoint(tmp_path):
    save(tmp_path / "a.safetensors", x=torch.ones(1))
    index(tmp_path, DIFFUSERS, {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"})
    assert said(tmp_path, DIFFUSERS) == (
        "it cannot be loaded: b.safetensors is missing, 1 of 2 of the 3 files that "
        "diffusion_pytorch_model.safetensors.index.json names: the download is incomplete; download it again"
    )
    save(tmp_path / DIFFUSERS.whole, x=torch.ones(1))
    assert said(tmp_path, DIFFUSERS) == (
        "it cannot be loaded: b.safetensors is missing, which diffusion_pytorch_model.safetensors.index.json names, "
        "but diffusion_pytorch_model.safetensors exists: the index is of another checkpoint; delete "
        "diffusion_pytorch_model.safetensors.index.json"
    )


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], ""),
        (["t5xxl_q4.gguf"], ", only t5xxl_q4.gguf"),
        (["model.fp16.safetensors"], ", only model.fp16.safetensors"),
        (["pytorch_model.bin", "tf_model.h5"], ", only pytorch_model.bin, tf_model.h5"),
        (["a.gguf", "b.gguf", "c.gguf", "d.ckpt"], ", only a.gguf, b.gguf, c.gguf and others"),
    ],
)
def test_weights_in_another_form_are_named_with_what_is_read(tmp_path, files, found):
    for name in files:
        (tmp_path / name).write_bytes(b"GGUF")
    assert said(tmp_path) == (
        f"it cannot be loaded: it has no model.safetensors{found}: expected safetensors of BF16, F16, F32 or F64; "
        f"download it again"
    )
    assert holds_weights(tmp_path) == bool(files)


def test_a_folder_that_is_missing_is_said_to_be(tmp_path):
    assert said(tmp_path / "nix") == "it cannot be loaded: there is no such folder; download it again"


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors.incomplete"])
def test_what_is_left_of_a_download_means_that_weights_were_wanted(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert not holds_weights(tmp_path)
    (tmp_path / name).write_text("{}")
    assert holds_weights(tmp_path)


@pytest.mark.parametrize("new_form", [True, False])
def test_pickled_tensors_are_read_where_they_are_asked_for_and_run_no_code(tmp_path, new_form):
    file = tmp_path / "pytorch_model.bin"
    tensors = {"x": torch.ones(2, 3, dtype=torch.float16), "n": torch.tensor([1, 2])}
    torch.save(tensors, file, _use_new_zipfile_serialization=new_form)
    found = stored_weights(tmp_path, TRANSFORMERS, SOURCE, pickles=True)
    expected = {"x": StoredTensor(shape=(2, 3), dtype="F16"), "n": StoredTensor(shape=(2,), dtype="int64")}
    assert found == StoredWeights(tensors=expected, pickled=True)
    assert said(tmp_path).startswith("it cannot be loaded: it has no model.safetensors, only pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-40])
    assert said(tmp_path, pickles=True).startswith(
        "it cannot be loaded: pytorch_model.bin does not only contain tensors ("
    )
    for other, message in (
        ({"x": Path("evil")}, "does not only contain tensors (Weights only load failed."),
        ([torch.ones(1)], "does not only contain named tensors"),
        ({"x": {"y": torch.ones(1)}}, "does not only contain named tensors"),
    ):
        torch.save(other, file)
        assert message in said(tmp_path, pickles=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(
    written=st.binary(max_size=40)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=4), json_values, max_size=3).map(
        lambda named: json.dumps({"weight_map": named}).encode()
    )
)
def test_whatever_an_index_says_is_one_line(tmp_path, written):
    (tmp_path / TRANSFORMERS.index).write_bytes(written)
    said(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(
    header=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=8),
)
def test_whatever_a_weight_file_begins_with_is_one_line_or_no_tensors(tmp_path, header, length, data):
    length = len(header) if length is None else length
    (tmp_path / TRANSFORMERS.whole).write_bytes(length.to_bytes(8, "little") + header + data)
    try:
        assert stored_weights(tmp_path, TRANSFORMERS, SOURCE).tensors == {}
    except TeacherError as error:
        assert str(error).startswith("it cannot be loaded: model.safetensors is not a whole safetensors file (")
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    index(tmp_path, TRANSFORMERS, {"x": name})
    assert said(tmp_path) == (
        f"it cannot be loaded: model.safetensors.index.json names {name!r}, expected files beside it; download it again"
    )


def test_headers_are_read_without_torch(tmp_path):
    save(tmp_path / "model.safetensors", x=torch.ones(2, dtype=torch.bfloat16))
    code = (
        "import sys, pathlib\nfrom secondcast.models.weights.files import *\n"
        "from secondcast.storage_schemas.errors import TeacherError\n"
        "source = CheckpointSource(where='it', error=TeacherError, again='')\n"
        "assert stored_weights(pathlib.Path(sys.argv[1]), TRANSFORMERS, source).dtypes == ['BF16']\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=ROOT)
