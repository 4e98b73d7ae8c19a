"""Students: the paper's architecture, saved and loaded to the bit, and refused where they do not fit."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from secondcast.models.student.distillt5 import published_config, student_config
from secondcast.models.student.folder import student_folder
from secondcast.models.student.student import check_fits, load_student, new_student, save_student, untrained_like
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.storage_schemas.errors import StudentError
from tests.storage_schemas.caches import some_manifest, some_prompts

CONFIG = {
    "vocab_size": 10,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "is_encoder_decoder": False,
}


@pytest.fixture
def teacher():
    return some_manifest(some_prompts(1)).teacher


@pytest.fixture
def config_folder(tmp_path):
    T5Config(**CONFIG).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def make(source, teacher, **changes):
    return new_student(str(source), teacher, **{"init": "auto", "dropout": 0.1, "seed": 0} | changes)


def test_the_projection_is_the_papers(config_folder, teacher):
    student = make(config_folder, teacher)
    names = {name: tuple(p.shape) for name, p in student.named_parameters() if "projection" in name}
    assert names == {"final_projection.0.weight": (6, 8), "final_projection.3.weight": (6, 6)}
    assert [type(part).__name__ for part in student.final_projection] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert student.final_projection[2].p == 0.1
    assert "encoder.shared.weight" in student.state_dict()
    assert "encoder.encoder.block.1.layer.0.SelfAttention.q.weight" in student.state_dict()


def test_a_student_is_fp32_and_the_same_for_the_same_seed(config_folder, teacher):
    one, same, other = make(config_folder, teacher), make(config_folder, teacher), make(config_folder, teacher, seed=1)
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.final_projection[0].weight, other.final_projection[0].weight)


def test_saved_and_loaded_it_gives_the_same_bits(config_folder, teacher, tmp_path):
    student = make(config_folder, teacher).eval()
    save_student(student, tmp_path / "s", tokenizer=None)
    ids_BT = torch.tensor([[5, 3, 1, 0, 0], [4, 4, 4, 9, 1]])
    assert torch.equal(load_student(tmp_path / "s")(ids_BT)[0], student(ids_BT)[0])
    (tmp_path / "usual").touch()
    assert (tmp_path / "s/model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pretrained_weights_are_taken_and_random_ones_are_not(tmp_path, teacher):
    torch.manual_seed(5)
    T5EncoderModel(T5Config(**CONFIG)).to(torch.bfloat16).save_pretrained(tmp_path / "t5")
    saved = T5EncoderModel.from_pretrained(tmp_path / "t5").shared.weight.float()
    assert torch.equal(make(tmp_path / "t5", teacher).encoder.shared.weight, saved)
    assert not torch.equal(make(tmp_path / "t5", teacher, init="random").encoder.shared.weight, saved)


def test_weights_that_cannot_be_read_are_refused(config_folder, teacher):
    (config_folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        StudentError, match=r"t5 cannot be loaded: model\.safetensors is not .*; download it again, or --init random$"
    ):
        make(config_folder, teacher)


@pytest.mark.parametrize("left", ["model.safetensors.index.json", "model.gguf", "flax_model.msgpack"])
def test_weights_that_are_there_but_not_read_are_no_random_start(config_folder, teacher, left):
    (config_folder / left).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(
        StudentError, match=r"t5 cannot be loaded: .*(is missing, 1 of 1 of the 1 files|, only \w+\.\w+:)"
    ):
        make(config_folder, teacher)
    make(config_folder, teacher, init="random")


def test_an_earlier_export_can_be_trained_on(config_folder, teacher, tmp_path):
    student = make(config_folder, teacher)
    save_student(student, tmp_path / "s", tokenizer=None)
    again = make(tmp_path / "s", teacher, seed=7, dropout=0.0)
    assert torch.equal(again.encoder.shared.weight, student.encoder.shared.weight)
    assert {m.p for m in again.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_a_student_of_another_width_is_refused(config_folder, teacher, tmp_path):
    save_student(make(config_folder, teacher), tmp_path / "s", tokenizer=None)
    wider = teacher.model_copy(update={"text_width": 7})
    with pytest.raises(StudentError, match="has embeddings of width 6, but this teacher reads 7"):
        make(tmp_path / "s", wider)
    with pytest.raises(StudentError, match="has embeddings of width 6, but this teacher reads 4096"):
        check_fits(load_student(tmp_path / "s"), 4096, "s")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**CONFIG, "model_type": "t5", "vocab_size": 9},
            "has a vocabulary of 9, but the cache's token ids go up to 9",
        ),
        ({"model_type": "bert"}, "x has no tokenizer, but a student that is not T5 needs its own: put tok"),
    ],
)
def test_other_models_are_refused(config, message, tmp_path, teacher):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    with pytest.raises(StudentError, match=message):
        make(tmp_path / "x", teacher)


def test_what_is_no_student_is_told_so(tmp_path, teacher):
    with pytest.raises(StudentError, match="no student .*nowhere: there is no such folder"):
        student_folder(tmp_path / "nowhere")
    with pytest.raises(StudentError, match=rf"^{tmp_path} has no student: it has no config.json; give a run folder"):
        student_folder(tmp_path)
    with pytest.raises(StudentError, match="has no config.json"):
        make(tmp_path, teacher)
    with pytest.raises(StudentError, match=r"no student './nix/nix': there is no such folder"):
        make("./nix/nix", teacher)


def test_it_warns_once_when_used_at_another_text_length(config_folder, teacher):
    student = make(config_folder, teacher).eval()
    with pytest.warns(UserWarning, match="trained at 5 text tokens, found 3: pass max_sequence_length=5"):
        student(torch.ones(1, 3, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(torch.ones(1, 3, dtype=torch.int64))
        make(config_folder, teacher)(torch.ones(1, 5, dtype=torch.int64))


def test_untrained_has_the_shape_and_other_weights(config_folder, teacher):
    student = make(config_folder, teacher)
    other = untrained_like(student, seed=3)
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in student.named_parameters()}
    assert not torch.equal(other.final_projection[0].weight, student.final_projection[0].weight)


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ({"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, 54),
        ({"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 130),
    ],
)
def test_t5_small_and_base_have_the_papers_sizes(size, millions):
    with torch.device("meta"):
        config = StudentConfig(
            vocab_size=32128, project_in_dim=size["d_model"], project_out_dim=4096, is_encoder_decoder=False, **size
        )
        parameters = SecondcastStudent(config).num_parameters()
    assert round(parameters / 1e6) == millions


@pytest.mark.parametrize(
    "lost", ["encoder.encoder.block.1.layer.0.SelfAttention.q.weight", "final_projection.0.weight"]
)
def test_the_class_of_an_export_refuses_weights_that_are_missing_or_of_another_model(
    lost, config_folder, teacher, tmp_path
):
    save_student(make(config_folder, teacher), tmp_path / "s", tokenizer=None)
    file = tmp_path / "s/model.safetensors"
    tensors = load_file(file)
    save_file({f"odd.{name}" if name == lost else name: t for name, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError) as caught:
        SecondcastStudent.from_pretrained(tmp_path / "s")
    assert str(caught.value) == (
        f"{tmp_path}/s lacks 1 weights of the student and has 1 others, among them {lost}: export it again"
    )


def test_in_half_precision_what_t5_keeps_in_float32_is_kept(config_folder, teacher, tmp_path):
    # transformers 5 asks the inner model too, 4 the outermost class alone.
    assert SecondcastStudent._keep_in_fp32_modules == T5EncoderModel._keep_in_fp32_modules == ["wo"]
    save_student(make(config_folder, teacher), tmp_path / "s", tokenizer=None)
    student = SecondcastStudent.from_pretrained(tmp_path / "s", dtype=torch.float16)
    kept = {name.split(".")[-2] for name, p in student.named_parameters() if p.dtype == torch.float32}
    assert kept == {"wo"} and student.dtype == torch.float16


def test_a_saved_student_carries_its_class_under_the_name_of_its_file(config_folder, teacher, tmp_path):
    save_student(make(config_folder, teacher), tmp_path / "s", tokenizer=None)
    # diffusers writes this name into model_index.json, and looks for NAME.py beside the weights.
    name = SecondcastStudent.__module__
    assert "." not in name and (tmp_path / "s" / f"{name}.py").is_file()
    config = json.loads((tmp_path / "s/config.json").read_bytes())
    assert config["auto_map"] == {"AutoConfig": f"{name}.StudentConfig", "AutoModel": f"{name}.SecondcastStudent"}


def test_the_width_of_the_published_form_is_read_where_the_published_class_reads_it(config_folder, teacher):
    student = make(config_folder, teacher)
    config = published_config(student)
    assert (config["out_dim"], config["project_out_dim"]) == (6, 6)
    assert student_config(config).project_out_dim == 6 and not hasattr(student_config(config), "out_dim")
    assert student_config({**config, "project_out_dim": 4096}).project_out_dim == 6
    del config["out_dim"]
    assert student_config(config).project_out_dim == 6
