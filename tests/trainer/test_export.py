"""An export takes text_encoder_2's place in FluxPipeline, where Understudy is not installed."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from models.student import load_student, student_folder
from storage_schemas.errors import BadSettings, BadStudent
from tests.trainer.test_train import run_training
from trainer.export import export

OUTSIDER = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
assert not any(importlib.util.find_spec(room) for room in ("trainer", "storage_schemas", "cache_builder"))
import torch
from diffusers import FluxPipeline
from transformers import AutoModel
from safetensors.torch import save_file
torch.set_num_threads(1)
student = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline = FluxPipeline.from_pretrained(sys.argv[2], text_encoder_2=student, torch_dtype=torch.float32)
with torch.no_grad():
    embedding = pipeline.encode_prompt(["a red dog", "two cats"], None, max_sequence_length=12)[0]
image = pipeline("a red dog", height=16, width=16, num_inference_steps=2, max_sequence_length=12).images[0]
assert image.size == (16, 16)
save_file({"embedding": embedding}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, cache_folder, dev_teacher, t5_config):
    folder = tmp_path_factory.mktemp("export")
    run_training(folder / "run", cache_folder, dev_teacher, t5_config)
    export(folder / "run", folder / "student")
    return folder


def test_flux_pipeline_takes_it_without_understudy_and_embeds_to_the_bit(exported, dev_teacher, tmp_path):
    (tmp_path / "outsider.py").write_text(OUTSIDER)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -S and the packages folder by hand: an editable installation of ours must not be found.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path.append({site!r}); sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read())"
    words = [
        str(tmp_path / "outsider.py"),
        str(exported / "student"),
        str(dev_teacher),
        str(tmp_path / "e.safetensors"),
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    student = load_student(exported / "student")
    import transformers

    tokenizer = transformers.T5TokenizerFast.from_pretrained(exported / "student")
    ids_BT = tokenizer(["a red dog", "two cats"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "e.safetensors")["embedding"], student(ids_BT)[0])


def test_it_holds_the_best_checkpoint_and_a_card(exported):
    best = load_file(student_folder(exported / "run") / "model.safetensors")
    ours = load_file(exported / "student/model.safetensors")
    assert all(torch.equal(best[name], ours[name]) for name in best)
    card = (exported / "student/README.md").read_text()
    assert "max_sequence_length=12" in card and "0 with the embedding loss, 6 with the vision loss" in card
    names = {file.name for file in (exported / "student").iterdir()}
    assert {"config.json", "model.safetensors", "student_network.py", "tokenizer.json", "README.md"} <= names


def test_a_folder_in_use_and_a_folder_that_is_no_run_are_refused(exported, tmp_path):
    with pytest.raises(BadSettings, match="student exists and is not empty: give a new folder"):
        export(exported / "run", exported / "student")
    with pytest.raises(BadStudent, match="student is not a run folder"):
        export(exported / "student", tmp_path / "again")
    with pytest.raises(BadStudent, match="no student .*nix"):
        export(tmp_path / "nix", tmp_path / "out")
