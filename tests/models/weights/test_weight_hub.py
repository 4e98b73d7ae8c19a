"""Students by hub name: the files that are loaded, all of one commit, or one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from secondcast.models.student.distillt5 import published_config, published_tensors
from secondcast.models.student.student import new_student
from tests.models.student.test_student import CONFIG
from tests.models.teacher.small_hub import COMMIT, Repository, run_apart, serve
from tests.models.weights.damaged_weights import shard, weight_file
from tests.storage_schemas.caches import some_manifest, some_prompts

ASK = """
import json, sys
from pathlib import Path
from secondcast.models.student.student import new_student
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.schema.manifest import Teacher
teacher = Teacher.model_validate_json(Path(sys.argv[1]).read_bytes())
for name in sys.argv[2:]:
    try:
        student = new_student(name, teacher, init="auto", dropout=0.0, seed=0)
        print(json.dumps(student.encoder.shared.weight.tolist()))
    except StudentError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def teacher():
    return some_manifest(some_prompts(1)).teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory, teacher):
    """whole, sharded, pickled: a T5; published: a student as DistillT5's; config: no weights; partial: a shard less."""
    made = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(5)
    T5EncoderModel(T5Config(**CONFIG)).save_pretrained(made / "whole")
    for name in ("sharded", "pickled", "config", "partial"):
        shutil.copytree(made / "whole", made / name)
    shard(made / "sharded", 3)
    shard(made / "partial", 3)[1].unlink()
    torch.save(load_file(weight_file(made / "pickled")), made / "pickled/pytorch_model.bin")
    weight_file(made / "pickled").unlink()
    weight_file(made / "config").unlink()
    student = new_student(str(made / "whole"), teacher, init="pretrained", dropout=0.0, seed=0)
    (made / "published").mkdir()
    (made / "published/config.json").write_text(json.dumps(published_config(student)))
    save_file(published_tensors(student), made / "published/model.safetensors", metadata={"format": "pt"})
    return {folder.name: folder for folder in made.iterdir()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, teacher):
    file = tmp_path_factory.mktemp("recorded") / "teacher.json"
    file.write_text(teacher.model_dump_json())
    return file


def ask(recorded, names, home, **environment):
    said = run_apart(ASK, str(recorded), *(f"someone/{name}" for name in names), home=home, **environment)
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.thorough
def test_a_student_by_hub_name_is_loaded_from_what_the_hub_has_and_from_what_was_fetched(folders, recorded, tmp_path):
    repositories = {f"someone/{name}": Repository(folder=folder) for name, folder in folders.items()}
    wanted = load_file(folders["whole"] / "model.safetensors")["shared.weight"].tolist()
    names = ["whole", "sharded", "pickled", "published"]
    with serve(repositories) as address:
        assert ask(recorded, names, tmp_path, HF_ENDPOINT=address) == [wanted] * 4
        none, partial, unknown = ask(recorded, ["config", "partial", "nix"], tmp_path, HF_ENDPOINT=address)
    assert none == (
        "someone/config cannot be loaded: it has no model.safetensors: expected safetensors of BF16, F16, F32 or F64; "
        "download it again, or --init random"
    )
    assert partial.startswith("someone/partial cannot be loaded: it cannot be downloaded from the hub (") and (
        partial.endswith("; run `hf download someone/partial` with a network connection, or give a folder")
    )
    assert unknown.startswith("no student 'someone/nix': it is not a folder, and cannot be downloaded from the hub (")
    sent = {name: {file for file, _ in one.sent} for name, one in repositories.items()}
    assert sent["someone/whole"] == {"config.json", "model.safetensors"}
    assert "pytorch_model.bin" in sent["someone/pickled"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(recorded, names, tmp_path, **offline) == [wanted] * 4
    snapshot = tmp_path / "hub/models--someone--sharded/snapshots"
    assert [folder.name for folder in snapshot.iterdir()] == [COMMIT]
    (snapshot / COMMIT / "model-00002-of-00003.safetensors").unlink()
    (lost,) = ask(recorded, ["sharded"], tmp_path, **offline)
    assert lost.startswith("someone/sharded cannot be loaded: it cannot be downloaded from the hub (LocalEntryNotFound")
