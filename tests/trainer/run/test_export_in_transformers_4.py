"""Exports load in transformers 4, which `make test-transformers-4` puts into a folder of its own."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secondcast.models.families.klein import KLEIN
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import STUDENTS_FOLDER, TEACHER_FOLDER
from secondcast.trainer.run.config import RecordedWith
from secondcast.trainer.run.export import export
from secondcast.trainer.run.export_facts import FACTS_FILE, ExportFacts
from tests.models.families.random_klein import make_klein, make_qwen_config, vocabulary_of
from tests.models.student.encoders import FAMILIES, make_encoder_folder
from tests.project.programs import programs, run_program

FOUR = Path(sys.prefix) / "transformers-4"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOUR.is_dir(), reason="make test-transformers-4")]
TEXTS = ["a red dog", "", "two cats, on the left: [X] don’t"]
HEAD = f"""
import sys
sys.path.insert(0, {str(FOUR)!r})
import json, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
assert transformers.__version__.startswith("4.57."), transformers.__version__
torch.set_num_threads(1)
"""
EMBED = """
for folder in sys.argv[1:]:
    student = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = student.config.text_length
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float16)
    with torch.no_grad():
        found = {"ids": ids, "embedding": student(ids)[0], "half": half(ids)[0]}
    found["fp32"] = torch.tensor(sum(p.dtype == torch.float32 for p in half.parameters()))
    save_file(found, folder.rsplit("/", 1)[1] + ".safetensors")
"""


def identity():
    teacher = find_teacher(str(TEACHER_FOLDER), ())
    return teacher, teacher.identity(text_length=12, hashed=False)


def make_export(folder: Path, family: str) -> Path:
    teacher, wanted = identity()
    source = STUDENTS_FOLDER / "tiny" if family == "t5" else make_encoder_folder(folder / "sources" / family, family)
    student = new_student(str(source), wanted, init="auto", dropout=0.0, seed=0)
    tokens = own_tokens(source, student)
    save_student(student, folder / "saved" / family, tokenizer=tokens.files if tokens else teacher.tokenizer_files())
    export(folder / "saved" / family, folder / family)
    return folder / family


def test_students_of_every_family_give_the_same_tokens_and_embeddings(tmp_path):
    folders = [make_export(tmp_path, family) for family in ("t5", *FAMILIES)]
    for kind in ("int8", "nf4"):
        export(tmp_path / "saved/t5", tmp_path / kind, quantize=kind)
        folders.append(tmp_path / kind)
    run_program(HEAD + f"TEXTS = {TEXTS!r}\n" + EMBED, tmp_path, *folders, without_us=True)
    for folder in folders:
        found = load_file(tmp_path / f"{folder.name}.safetensors")
        student = load_student(folder)
        tokens = own_tokens(folder, student)
        if tokens is not None:
            assert torch.equal(tokens.batch(TEXTS), found["ids"]), folder.name
        with torch.no_grad():
            assert torch.allclose(student(found["ids"])[0], found["embedding"], atol=1e-5), folder.name
        assert torch.isfinite(found["half"]).all()
        # T5's `wo`, one per block.
        assert int(found["fp32"]) == {"t5": 2, "mt5": 1}.get(folder.name, 0), folder.name


def test_a_student_in_place_of_a_language_model_gives_the_same_layers(tmp_path):
    teacher = make_klein(tmp_path / "teacher")
    wanted = find_teacher(str(teacher), ()).identity(text_length=28, hashed=False)
    source = make_qwen_config(tmp_path / "qwen", vocabulary_of(teacher))
    save_student(
        new_student(str(source), wanted, init="auto", dropout=0.0, seed=0), tmp_path / "saved", tokenizer=None
    )  # fmt: skip
    export(tmp_path / "saved", tmp_path / "klein")
    ids_BT = KLEIN.tokenizer(teacher / "tokenizer").padded(["a", "a red dog"], 28)
    program = f"""
student = AutoModel.from_pretrained({str(tmp_path / "klein")!r}, trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor({ids_BT.tolist()})
with torch.no_grad():
    found = student(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True, use_cache=False)
save_file({{str(layer): rows for layer, rows in found.hidden_states.items()}}, "layers.safetensors")
"""
    run_program(HEAD + program, tmp_path, without_us=True)
    found = load_file(tmp_path / "layers.safetensors")
    with torch.no_grad():
        expected_BTD = load_student(tmp_path / "klein")(ids_BT)[0]
    assert torch.allclose(torch.cat([found[layer] for layer in ("9", "18", "27")], -1), expected_BTD, atol=1e-5)


def test_the_card_and_a_saved_pipeline_run(tmp_path):
    recorded = RecordedWith(teacher="T", height=24, width=24, steps=2, schedule="diffusers", dtype="float32")
    facts = ExportFacts(
        teacher="T", teacher_digest="a", sampling_digest="b", text_length=12, guidance=(2.0,), settings={},
        checkpoint="c", validation_loss=None, replay_error=None, created_by="u", recorded=recorded,
    )  # fmt: skip
    saved = make_export(tmp_path, "t5")
    (saved / FACTS_FILE).write_text(facts.model_dump_json())
    folder = tmp_path / "student"
    export(saved, folder)
    # The pocket teacher's tokenizers as transformers 4 writes them.
    shutil.copytree(TEACHER_FOLDER, tmp_path / "T")
    for part, kind in (("tokenizer", "CLIPTokenizerFast"), ("tokenizer_2", "T5TokenizerFast")):
        for file, changes in (
            ("model_index.json", {part: ["transformers", kind]}),
            (f"{part}/tokenizer_config.json", {}),
        ):
            config = json.loads((tmp_path / "T" / file).read_text()) | changes
            config.pop("extra_special_tokens", None)
            (tmp_path / "T" / file).write_text(json.dumps(config))
    alone, whole = programs((folder / "README.md").read_text())
    alone = alone.replace("PATH_OF_THIS_FOLDER", str(folder)).replace('"T"', repr(str(tmp_path / "T")))
    run_program(HEAD + alone + 'pipeline.save_pretrained("my-pipeline")\n', tmp_path, without_us=True)
    folder.rename(tmp_path / "moved")
    run_program(HEAD + whole, tmp_path, without_us=True)
