"""The text projection from a small hub on this machine: what is fetched of the transformer, and what is refused."""

import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from secondcast.commands.shell.resolve import resolve_context_projection, resolve_teacher
from secondcast.models.teacher.context_projection import find_context_projection, load_context_projection
from secondcast.models.teacher.folder import find_teacher
from secondcast.models.teacher.hub_tensor import read_tensor
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.manifest import Teacher
from tests.models.teacher.small_hub import COMMIT, NAME, Repository, run_apart, serve

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ASK = """
import json, sys
from huggingface_hub.cli.hf import main
from secondcast.commands.shell.resolve import resolve_context_projection, resolve_teacher
from secondcast.models.teacher.context_projection import find_context_projection
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.manifest import Teacher
recorded = Teacher.model_validate_json(open(sys.argv[1]).read())
for name in json.loads(sys.argv[2]):
    try:
        found = find_context_projection(name, recorded)
        print(json.dumps([found.source, str(found.context_ID.dtype), found.context_ID.tolist()]))
    except TeacherError as error:
        print(json.dumps(str(error)))
if sys.argv[3:]:
    sys.argv[1:] = sys.argv[3:]
    main()
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
def context_ID(teacher, file) -> list:
    with safe_open(teacher / file, framework="pt") as tensors:
        return tensors.get_tensor("context_embedder.weight").float().tolist()


@pytest.fixture(scope="module")
def recorded(teacher, tmp_path_factory) -> Path:
    identity = find_teacher(str(teacher), ("transformer",)).identity(text_length=12)
    path = tmp_path_factory.mktemp("recorded") / "teacher.json"
    path.write_text(identity.model_dump_json())
    return path


def test_a_projection_of_another_width_or_of_whole_numbers_is_refused(dev_teacher, tmp_path):
    folder = find_teacher(str(shutil.copytree(dev_teacher, tmp_path / "t")), ("transformer",))
    identity = folder.identity(text_length=12)
    with pytest.raises(TeacherError) as caught:
        load_context_projection(folder, identity.model_copy(update={"text_width": 7}), torch.device("cpu"))
    assert str(caught.value) == (
        f"{folder.path}/transformer cannot be loaded: context_embedder.weight is bfloat16 [32, 24], expected a "
        "floating-point matrix with 7 columns, the cache's text width; download it again"
    )
    (file,) = folder.weights("transformer")
    save_file({"context_embedder.weight": torch.ones(32, 24, dtype=torch.int8)}, file)
    identity = folder.identity(text_length=12)
    with pytest.raises(TeacherError, match=r"context_embedder.weight is int8 \[32, 24\], expected a floating-point m"):
        load_context_projection(folder, identity, torch.device("cpu"))


def of_another_model(teacher: Path, file: str, to: Path) -> Path:
    shutil.copytree(teacher, to)
    tensors = load_file(to / file)
    tensors["context_embedder.weight"] += 1
    save_file(tensors, to / file)
    return to


def without(teacher: Path, file: str, to: Path) -> Path:
    shutil.copytree(teacher, to)
    (to / file).unlink()
    return to


@dataclass(kw_only=True)
class Asked:
    """What was answered, by name, with the hub and then without it, and what was sent before the way out was taken."""

    online: dict[str, list | str]
    offline: dict[str, list | str]
    sent: dict[str, list[tuple[str, int]]]


@pytest.fixture(scope="module")
def asked(teacher, file, recorded, tmp_path_factory) -> Asked:
    home = tmp_path_factory.mktemp("home")
    repositories = {
        NAME: Repository(folder=teacher),
        "someone/second": Repository(folder=teacher),
        "someone/plain": Repository(folder=teacher, large=".nothing"),
        "someone/rangeless": Repository(folder=teacher, knows_ranges=False),
        "someone/other": Repository(folder=of_another_model(teacher, file, home / "other")),
        "someone/less": Repository(folder=without(teacher, file, home / "less")),
    }

    def ask(names: list[str], *then: str, **environment: str) -> dict:
        lines = run_apart(ASK, str(recorded), json.dumps(names), *then, home=home, **environment).splitlines()
        return {name: json.loads(line) for name, line in zip(names, lines, strict=False)}

    way_out = ["download", "someone/second", file, "--revision", COMMIT]
    with serve(repositories) as hub:
        online = ask([f"{name}@v1" for name in repositories], *way_out, HF_ENDPOINT=hub)
    offline = ask([f"{name}@{COMMIT}" for name in (NAME, "someone/second")], HF_HUB_OFFLINE="1")
    return Asked(online=online, offline=offline, sent={name: found.sent for name, found in repositories.items()})


@pytest.mark.slow
def test_of_the_transformer_one_tensor_is_fetched(asked, teacher, file, context_ID):
    assert asked.online[f"{NAME}@v1"] == [NAME, "torch.float32", context_ID]
    data = (teacher / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensor = load_file(teacher / file)["context_embedder.weight"]
    reads = [count for name, count in asked.sent[NAME] if name == file]
    assert reads == [8, length, tensor.numel() * tensor.element_size()] and sum(reads) < len(data) / 4
    fetched = {name for name, _ in asked.sent[NAME]}
    assert fetched == {file, "model_index.json", "transformer/config.json", f"transformer/{INDEX}"}


@pytest.mark.thorough
def test_without_the_hub_the_way_out_is_named_and_leads_out(asked, teacher, file, context_ID):
    assert asked.offline[f"{NAME}@{COMMIT}"] == (
        f"context_embedder.weight cannot be read from {file} of {NAME}@{COMMIT} (OfflineModeIsEnabled): check "
        f"the network, or download the file with `hf download {NAME} {file} --revision {COMMIT}`"
    )
    # Of the second repository that was done.
    assert asked.sent["someone/second"][-1] == (file, (teacher / file).stat().st_size)
    assert asked.offline[f"someone/second@{COMMIT}"] == ["someone/second", "torch.float32", context_ID]


@pytest.mark.thorough
def test_a_file_of_which_the_hub_states_no_sha256_is_fetched_whole(asked, teacher, file, context_ID):
    assert asked.online["someone/plain@v1"] == ["someone/plain", "torch.float32", context_ID]
    weights = [(name, count) for name, count in asked.sent["someone/plain"] if name.endswith(".safetensors")]
    assert weights == [(file, (teacher / file).stat().st_size)]


def test_of_another_model_nothing_is_read(asked, file, recorded):
    assert file not in {name for name, _ in asked.sent["someone/other"]}
    was = json.loads(recorded.read_text())["weights"][file][:16]
    assert re.fullmatch(
        rf"{file} of someone/other@{COMMIT} has sha256 \w{{16}}, but the cache was recorded with {was}, another model: "
        rf"give the recorded one with --backbone",
        asked.online["someone/other@v1"],
    )


@pytest.mark.parametrize(
    ("name", "error"), [("someone/rangeless", "ValueError"), ("someone/less", "FileNotFoundError")]
)
def test_a_hub_that_cannot_give_it_is_one_line(asked, file, name, error):
    said = asked.online[f"{name}@v1"]
    assert said.startswith(f"context_embedder.weight cannot be read from {file} of {name}@{COMMIT} ({error}): ")
    assert "\n" not in said


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


def test_a_local_folder_is_read_as_before(teacher, recorded, file, context_ID):
    identity = Teacher.model_validate_json(recorded.read_text())
    found = find_context_projection(str(teacher), identity)
    assert (found.source, found.context_ID.tolist()) == (str(teacher), context_ID)
    with pytest.raises(
        TeacherError, match=rf"{teacher}/{file} has sha256 \w{{16}}, but the cache was recorded with None, an"
    ):
        find_context_projection(str(teacher), identity.model_copy(update={"weights": {}}))


def test_the_embedded_teacher_goes_by_its_name():
    identity = resolve_teacher("pocket", ("transformer",)).identity(text_length=12)
    found = resolve_context_projection("pocket", identity)
    assert found.source == "pocket" and found.context_ID.shape[1] == identity.text_width
