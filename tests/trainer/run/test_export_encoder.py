"""Exports of students with a tokenizer of their own: FluxPipeline takes both where Secondcast is not installed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.run.export import export
from secondcast.trainer.run.export_facts import FACTS_FILE, ExportFacts
from tests.models.student.encoders import make_encoder_folder
from tests.project.programs import run_program

OUTSIDER = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
assert not any(importlib.util.find_spec(room) for room in ("trainer", "storage_schemas", "cache_builder"))
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[3:]:
    student = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pipeline = FluxPipeline.from_pretrained(
        sys.argv[1], text_encoder_2=student, tokenizer_2=tokenizer, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    length = student.config.text_length
    with torch.no_grad():
        embedding = pipeline.encode_prompt(["a red dog", "two cats"], None, max_sequence_length=length)[0]
    image = pipeline("a red dog", height=16, width=16, num_inference_steps=1, max_sequence_length=length).images[0]
    assert image.size == (16, 16)
    assert student.to(torch.bfloat16)(torch.ones(1, length, dtype=torch.int64))[0].dtype == torch.bfloat16
    save_file({"embedding": embedding}, f"{sys.argv[2]}/{folder.rsplit('/', 1)[-1]}.safetensors")
"""
FAMILIES = ("bert", "clip_text_model", "bart")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("exports")
    opened = find_teacher(str(dev_teacher), ())
    identity = opened.identity(text_length=opened.text_length, hashed=False)
    for family in FAMILIES:
        source = make_encoder_folder(folder / "sources" / family, family)
        student = new_student(str(source), identity, init="auto", dropout=0.1, seed=0)
        save_student(student, folder / "saved" / family, tokenizer=own_tokens(source, student).files)
        export(folder / "saved" / family, folder / family)
    return folder


@pytest.mark.slow
def test_flux_pipeline_takes_student_and_tokenizer_and_embeds_to_the_bit(exported, dev_teacher, tmp_path):
    run_program(OUTSIDER, tmp_path, dev_teacher, tmp_path, *(exported / f for f in FAMILIES), without_us=True)
    for family in FAMILIES:
        student = load_student(exported / family)
        ids_BT = own_tokens(exported / family, student).batch(["a red dog", "two cats"])
        with torch.no_grad():
            expected_BTD = student(ids_BT)[0]
        assert torch.equal(load_file(tmp_path / f"{family}.safetensors")["embedding"], expected_BTD), family


def test_an_export_holds_what_was_saved_and_a_card_that_says_how_to_load_both(exported):
    for family in FAMILIES:
        saved = load_file(exported / "saved" / family / "model.safetensors")
        ours = load_file(exported / family / "model.safetensors")
        assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in saved)
        names = {file.name for file in (exported / family).iterdir()}
        assert names == {
            "config.json", "model.safetensors", "encoder_student_network.py", "tokenizer.json",
            "tokenizer_config.json", "README.md",
        }  # fmt: skip
        card = (exported / family / "README.md").read_text()
        assert f"A text (`{family}`) encoder with projection" in card
        assert "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in card
        assert "text_encoder_2=student, tokenizer_2=tokenizer" in card and "max_sequence_length=12," in card
        assert "runs `encoder_student_network.py` of this folder" in card


def test_an_export_is_exported_again_to_the_same_bytes(exported, tmp_path):
    facts = ExportFacts(
        teacher="t", teacher_digest="a", sampling_digest="b", text_length=12, guidance=(2.0, 3.5),
        settings={"loss": "vision", "steps": 3}, checkpoint="checkpoint-3", validation_loss=0.5, replay_error=None,
        created_by="u",
    )  # fmt: skip
    (exported / "saved/bart" / FACTS_FILE).write_text(facts.model_dump_json())
    export(exported / "saved/bart", tmp_path / "first")
    export(tmp_path / "first", tmp_path / "again")
    (exported / "saved/bart" / FACTS_FILE).unlink()
    files = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == files
    assert json.loads(files["config.json"])["trained_guidance"] == [2.0, 3.5]


@pytest.mark.parametrize(("form", "name"), [("distillt5", "o"), ("comfyui", "o.safetensors")])
def test_forms_that_hold_t5_only_refuse_it(form, name, exported, tmp_path):
    with pytest.raises(
        SettingsError,
        match=rf"bart is a 'bart' student with its own tokenizer, but --to {form} only supports T5 students that read "
        r"the teacher's tokens: give --to diffusers$",
    ):
        export(exported / "bart", tmp_path / name, to=form)
    assert not list(tmp_path.iterdir())
