"""An export takes text_encoder_2's place in FluxPipeline, where Secondcast is not installed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from secondcast.evaluation.text_encoder import teacher_parts
from secondcast.models.student.distillt5 import comfyui_differences
from secondcast.models.student.folder import student_folder
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.storage_schemas.errors import SettingsError, StudentError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.run.export import export, weights_text
from secondcast.trainer.run.export_facts import ExportFacts, facts_of
from secondcast.trainer.run.model_card import card_of
from tests.commands.test_cli import secondcast
from tests.models.student.encoders import make_encoder_folder
from tests.models.weights.damaged_weights import shard
from tests.project.programs import run_program
from tests.trainer.test_train import run_training

OUTSIDER = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
assert not any(importlib.util.find_spec(room) for room in ("trainer", "storage_schemas", "cache_builder"))
import torch
from diffusers import FluxPipeline
from transformers import AutoModel
from safetensors.torch import save_file
torch.set_num_threads(1)
student = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_flux_pipeline_takes_it_without_secondcast_and_embeds_to_the_bit(exported, dev_teacher, tmp_path, kind):
    export(exported / "run", tmp_path / "student", quantize=kind)
    words = (tmp_path / "student", dev_teacher, tmp_path / "e.safetensors")
    run_program(OUTSIDER, tmp_path, *words, without_us=True)
    student = load_student(tmp_path / "student")
    tokenizer = T5TokenizerFast.from_pretrained(tmp_path / "student")
    ids_BT = tokenizer(["a red dog", "two cats"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "e.safetensors")["embedding"], student(ids_BT)[0])


def test_it_holds_the_best_checkpoint(exported):
    best = load_file(student_folder(exported / "run") / "model.safetensors")
    ours = load_file(exported / "student/model.safetensors")
    assert all(torch.equal(best[name], ours[name]) for name in best)
    names = {file.name for file in (exported / "student").iterdir()}
    assert {"config.json", "model.safetensors", "student_network.py", "tokenizer.json", "README.md"} <= names


def test_a_run_that_was_never_validated_gives_its_last_checkpoint_and_says_so(exported, tmp_path):
    run = shutil.copytree(exported / "run", tmp_path / "run")
    assert export(run, tmp_path / "a") == []
    (run / "best.json").unlink()
    assert export(run, tmp_path / "b") == [
        f"{run} has no validated checkpoint: exported the last one, checkpoint-00000006"
    ]


def test_the_card_states_recipe_losses_digests_licence_and_how_to_load(exported, cache_folder, dev_teacher):
    card = (exported / "student/README.md").read_text()
    manifest = Cache.open(cache_folder).manifest
    digests, steps = manifest.digests(), manifest.sampling.steps
    best = json.loads((exported / "run/best.json").read_text())
    assert "max_sequence_length=12," in card and f'from_pretrained(\n    "{dev_teacher}"' in card
    assert manifest.sampling.height == 16 and max(manifest.sampling.guidance) == 5.0
    assert f"height=16,\n    width=16,\n    num_inference_steps={steps},\n    guidance_scale=3.5," in card
    assert "guidance **2 to 5**" in card and f"{load_student(exported / 'student').num_parameters():,} par" in card
    for row in (
        f"| teacher digest | `{digests['teacher']}` |",
        f"| sampling digest | `{digests['sampling']}` |",
        f"| validation loss at this checkpoint | {best['loss']:.6g} |",
        "| replay error (loss of a perfect student) | 0 |",
        f"| checkpoint | {best['checkpoint']} |",
        "| steps | 6 |",
        "| learning-rate | 0.001 |",
        "| data-order | shuffled |",
    ):
        assert row in card.splitlines(), row
    assert (
        "The teacher's licence determines what that means for the student" in card
        and "This card cannot name it: the teacher\nis not named after a supported model. FLUX.1-dev and " in card
        and "base_model" not in card
        and "license" not in card
    )


def test_the_card_of_a_hub_teacher_names_it_as_base_model_and_flux_dev_is_non_commercial(exported):
    facts = facts_of(exported / "student", exported / "student")
    flux = facts.model_copy(update={"teacher": "black-forest-labs/FLUX.1-dev", "guidance": None, "replay_error": None})
    card = card_of("diffusers", flux, text_length=77, parameters=1, weights="w")
    assert "\nbase_model: black-forest-labs/FLUX.1-dev\n" in card and "non-commercial licence" in card
    licence = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert f"\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: {licence}\n" in card
    assert "No guidance was recorded." in card and "| replay error (loss of a perfect student) | not measured |" in card


def test_the_card_shows_the_samples_of_the_exported_checkpoint_and_later_exports_keep_them(exported, tmp_path, capsys):
    run = shutil.copytree(exported / "run", tmp_path / "run")
    step = int(student_folder(run).parent.name.rpartition("-")[2])
    (run / "samples").mkdir()
    (run / "samples" / f"step-{step + 1:06d}.png").write_bytes(b"of another step")
    (tmp_path / "table.md").write_text("| a |\n|---|\n| 0.9 |\n")
    assert secondcast("export", run, tmp_path / "without", capsys=capsys)[0] == 0
    (run / "samples" / f"step-{step:06d}.png").write_bytes(b"sheet")
    words = ["export", run, tmp_path / "with", "--scores", tmp_path / "table.md"]
    assert secondcast(*words, capsys=capsys)[0] == 0
    assert secondcast("export", tmp_path / "with", tmp_path / "again", capsys=capsys)[0] == 0
    for name, shown in (("without", False), ("with", True), ("again", True)):
        assert ("](samples.png)" in (tmp_path / name / "README.md").read_text()) == shown
        assert (tmp_path / name / "samples.png").exists() == shown
    assert (tmp_path / "again/samples.png").read_bytes() == b"sheet"
    assert "\n## Scores\n\n| a |\n" in (tmp_path / "with/README.md").read_text()


def test_the_config_carries_text_length_and_guidance_range(exported):
    config = json.loads((exported / "student/config.json").read_text())
    assert (config["text_length"], config["trained_guidance"]) == (12, [2.0, 5.0])


IDS_BT = torch.tensor([[5, 3, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0], [4, 4, 7, 12, 20, 33, 1, 0, 0, 0, 0, 0]])


def embedding_by_key_names(file: Path, config: dict) -> torch.Tensor:
    """What DistillT5's class and the ComfyUI node make of the keys, built from the names alone."""
    tensors = load_file(file)
    # transformers' other ways of computing attention round otherwise.
    encoder = T5EncoderModel(T5Config(**config, attn_implementation="eager")).eval()
    ours = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
    ours["encoder.embed_tokens.weight"] = ours["shared.weight"]
    encoder.load_state_dict(ours)
    first, second = tensors["final_projection.0.weight"], tensors["final_projection.3.weight"]
    assert len(tensors) == len(ours) - 1 + 2
    with torch.no_grad():
        return linear(torch.relu(linear(encoder(IDS_BT)[0], first)), second)


def test_distillt5_has_the_published_keys_and_embeds_to_the_bit(exported, tmp_path):
    assert export(exported / "run", tmp_path / "d", to="distillt5") == []
    config = json.loads((tmp_path / "d/config.json").read_text())
    assert config["architectures"] == ["T5EncoderWithProjection"] and config["model_type"] == "t5"
    assert (config["project_in_dim"], config["project_out_dim"], config["text_length"]) == (16, 24, 12)
    # Where the published class looks for the width.
    assert config["out_dim"] == 24
    assert "auto_map" not in config
    names = load_file(tmp_path / "d/model.safetensors").keys()
    assert "encoder.shared.weight" in names and "final_projection.3.weight" in names
    assert "encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in names
    student = load_student(exported / "student")
    with torch.no_grad():
        expected = student(IDS_BT)[0]
        assert torch.equal(embedding_by_key_names(tmp_path / "d/model.safetensors", config), expected)
        assert torch.equal(load_student(tmp_path / "d")(IDS_BT)[0], expected)
    tokenizer = T5TokenizerFast.from_pretrained(tmp_path / "d")
    assert tokenizer("a red dog").input_ids[-1] == 1
    card = (tmp_path / "d/README.md").read_text()
    assert "T5EncoderWithProjection" in card and "| steps | 6 |" in card and "trust_remote_code" not in card


def test_comfyui_is_one_file_with_those_keys_and_the_node_is_warned_of(exported, tmp_path):
    remarks = export(exported / "run", tmp_path / "s.safetensors", to="comfyui")
    config = json.loads((exported / "student/config.json").read_text()) | {"model_type": "t5"}
    student = load_student(exported / "student")
    with torch.no_grad():
        assert torch.equal(embedding_by_key_names(tmp_path / "s.safetensors", config), student(IDS_BT)[0])
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert "text_model.encoder.layers.1.mlp.fc1.weight" not in file.keys()  # noqa: SIM118
        facts = ExportFacts.model_validate_json(file.metadata()["secondcast"])
    assert facts == facts_of(exported / "student", exported / "student")
    (tmp_path / "usual").touch()
    assert (tmp_path / "s.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert re.search(
        r"which has d_model = 16 \(768\), num_layers = 1 \(12\), .*the node's values in parentheses\)$", remarks[0]
    )
    assert "pads prompts to 256 tokens, but this student was trained at 12" in remarks[1] and len(remarks) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"feed_forward_proj": "relu", "d_ff": 3072}, ["d_ff = 3072 (2048)", "feed_forward_proj = relu (gated-gelu)"]),
    ],
)
def test_t5_v1_1_base_fits_the_node_and_t5_base_does_not(changes, expected):
    base = {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_kv": 64, "d_ff": 2048, "vocab_size": 32128}
    widths = {"project_in_dim": 768, "project_out_dim": 4096}
    with torch.device("meta"):
        student = SecondcastStudent(StudentConfig(**{"feed_forward_proj": "gated-gelu", **base, **widths, **changes}))
    assert comfyui_differences(student) == expected


def test_an_export_is_exported_again_to_the_same_bytes(exported, tmp_path):
    export(exported / "student", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json", "secondcast.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / "student" / name).read_bytes(), name
    export(exported / "run", tmp_path / "d", to="distillt5")
    export(tmp_path / "d", tmp_path / "back")
    assert (
        load_file(tmp_path / "back/model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()
    )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_export_states_its_weights_and_is_exported_again_to_the_same_bytes(exported, tmp_path, kind):
    export(exported / "run", tmp_path / "q", quantize=kind)
    export(tmp_path / "q", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "q" / name).read_bytes(), name
    assert json.loads((tmp_path / "q/config.json").read_text())["quantization"] == kind
    size = weights_text(tmp_path / "q")
    assert size.startswith(f"{kind} weights, ") and f"parameters ({size})" in (tmp_path / "q/README.md").read_text()
    assert weights_text(exported / "student").startswith("float32 weights, ")


def test_a_quantization_that_cannot_be_made_is_refused(exported, cache_folder, tmp_path):
    for form, name in (("distillt5", "d"), ("comfyui", "d.safetensors")):
        with pytest.raises(
            SettingsError, match=rf"--quantize is nf4, but --to {form} is a format of floating-point we"
        ):
            export(exported / "run", tmp_path / name, to=form, quantize="nf4")
    export(exported / "run", tmp_path / "q", quantize="int8")
    with pytest.raises(SettingsError, match=r"q has int8 weights already, but --quantize nf4 needs floating-point on"):
        export(tmp_path / "q", tmp_path / "again", quantize="nf4")
    with pytest.raises(SettingsError, match=r"q has int8 weights already, but --to distillt5 needs floating-point on"):
        export(tmp_path / "q", tmp_path / "again", to="distillt5")
    identity = Cache.open(cache_folder).manifest.teacher
    source = make_encoder_folder(tmp_path / "bert", "bert")
    save_student(
        new_student(str(source), identity, init="random", dropout=0.0, seed=0), tmp_path / "own", tokenizer=None
    )
    with pytest.raises(
        SettingsError, match=r"own is a 'bert' student with its own tokenizer, but --quantize only supp"
    ):
        export(tmp_path / "own", tmp_path / "again", quantize="nf4")
    assert not (tmp_path / "again").exists()


def test_a_low_rank_projection_is_one_matrix_in_the_published_formats(cache_folder, exported, t5_config, tmp_path):
    identity = Cache.open(cache_folder).manifest.teacher
    student = new_student(str(t5_config), identity, init="random", dropout=0.0, seed=0, projection_rank=5).eval()
    save_student(student, tmp_path / "low", tokenizer=None)
    export(tmp_path / "low", tmp_path / "d", to="distillt5")
    config = json.loads((tmp_path / "d/config.json").read_text())
    assert "projection_rank" not in config
    with torch.no_grad():
        assert torch.allclose(
            embedding_by_key_names(tmp_path / "d/model.safetensors", config), student(IDS_BT)[0], atol=1e-5
        )


def test_an_index_of_several_weight_files_is_not_copied_beside_the_one_file(exported, tmp_path):
    shutil.copytree(exported / "student", tmp_path / "sharded")
    shard(tmp_path / "sharded", 3)
    for form in ("diffusers", "distillt5"):
        export(tmp_path / "sharded", tmp_path / form, to=form)
        assert [file.name for file in (tmp_path / form).glob("*.safetensors*")] == ["model.safetensors"]
        assert (tmp_path / form / "tokenizer.json").is_file()
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "diffusers", exported / "student")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_goes_on_from_the_distillt5_form_with_its_weights(exported, cache_folder, tmp_path):
    export(exported / "run", tmp_path / "d", to="distillt5")
    teacher = Cache.open(cache_folder).manifest.teacher.model_copy(update={"text_length": 11})
    student = new_student(str(tmp_path / "d"), teacher, init="auto", dropout=0.3, seed=1)
    assert torch.equal(student.encoder.shared.weight, load_student(exported / "student").encoder.shared.weight)
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert student.config.text_length == 11 and not hasattr(student.config, "trained_guidance")


def test_a_run_and_its_export_lead_the_sampling_with_their_own_tokenizer(exported):
    for folder in (exported / "run", exported / "student"):
        assert teacher_parts(str(folder)) == ("transformer", "scheduler", "vae")


def test_a_student_without_facts_is_exported_with_a_card_that_says_so(exported, tmp_path):
    export(student_folder(exported / "run"), tmp_path / "bare")
    card = (tmp_path / "bare/README.md").read_text()
    assert "# A student of an unrecorded teacher" in card
    assert "Not recorded: this student was not exported from a run folder." in card
    assert not (tmp_path / "bare/secondcast.json").exists()


def test_a_place_that_is_taken_or_cannot_be_written_is_refused_and_nothing_is_left(exported, tmp_path):
    with pytest.raises(SettingsError, match="student exists and is not empty: give a new folder"):
        export(exported / "run", exported / "student")
    with pytest.raises(
        SettingsError, match=r"x has the suffix '', expected '.safetensors': --to comfyui writes .* x.safe"
    ):
        export(exported / "run", tmp_path / "x", to="comfyui")
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(SettingsError, match=r"f.safetensors exists: give a new file for the export"):
        export(exported / "run", tmp_path / "f.safetensors", to="comfyui")
    for form, name in (("diffusers", "o"), ("distillt5", "o"), ("comfyui", "o.safetensors")):
        with pytest.raises(SettingsError, match=r"o\S* cannot be written \(Not a directory\): give another OUT"):
            export(exported / "run", tmp_path / "f.safetensors/x" / name, to=form)
    (tmp_path / "empty").mkdir()
    export(exported / "run", tmp_path / "empty")
    assert {file.name for file in tmp_path.iterdir()} == {"f.safetensors", "empty"}


def test_what_holds_no_student_is_refused(exported, tmp_path):
    with pytest.raises(StudentError, match="no student .*nix"):
        export(tmp_path / "nix", tmp_path / "out")
    (tmp_path / "run").mkdir()
    shutil.copyfile(exported / "run/config.json", tmp_path / "run/config.json")
    with pytest.raises(StudentError, match="run has no checkpoint yet: run the `secondcast train` command again"):
        export(tmp_path / "run", tmp_path / "out")
    export(exported / "run", tmp_path / "s.safetensors", to="comfyui")
    with pytest.raises(StudentError, match="s.safetensors is a single file without configuration and tok"):
        export(tmp_path / "s.safetensors", tmp_path / "out")
    shutil.copytree(exported / "student", tmp_path / "damaged")
    (tmp_path / "damaged/secondcast.json").write_text("{}")
    with pytest.raises(
        StudentError, match=r"damaged/secondcast.json cannot be read \(Field required\): export from an"
    ):
        export(tmp_path / "damaged", tmp_path / "out")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"short")
    with pytest.raises(
        StudentError, match=r"damaged cannot be loaded: model.safetensors is not .*; export the run again"
    ):
        export(tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["diffusers", "distillt5", "comfyui"])
def test_an_export_is_as_private_as_the_umask_says(exported, tmp_path, form):
    before = os.umask(0o077)
    try:
        export(exported / "run", tmp_path / "s.safetensors", to=form)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "s.safetensors", *(tmp_path / "s.safetensors").rglob("*")) if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o600)}
