"""Students of any text encoder: every family embeds, saves and loads to the bit, and what is none is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    WhisperConfig,
)

from secondcast.models.student.encoder_student import longest_text, with_dropout
from secondcast.models.student.encoder_student_network import EncoderStudent, EncoderStudentConfig, _other_names
from secondcast.models.student.folder import student_folder
from secondcast.models.student.student import check_fits, load_student, new_student, save_student, untrained_like
from secondcast.models.student.student_network import SecondcastStudent
from secondcast.models.student.tokens import own_tokens, text_length_remark
from secondcast.storage_schemas.errors import StudentError
from tests.models.student.encoders import FAMILIES, SIZE, make_encoder_folder, rewrite_config
from tests.storage_schemas.caches import some_manifest, some_prompts

TEXTS = ["a red dog", "", "a sign that says no and two cats on the left"]


@pytest.fixture(scope="module")
def teacher():
    return some_manifest(some_prompts(1)).teacher.model_copy(update={"text_length": 12, "text_width": 24})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {family: make_encoder_folder(folder / family, family, seed=5) for family in FAMILIES}


def make(source, teacher, **changes):
    return new_student(str(source), teacher, **{"init": "auto", "dropout": 0.1, "seed": 0} | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_embeds_with_its_own_tokens_and_is_saved_and_loaded_to_the_bit(family, sources, teacher, tmp_path):
    student = make(sources[family], teacher).eval()
    tokens = own_tokens(sources[family], student)
    assert isinstance(student, EncoderStudent) and not isinstance(student, SecondcastStudent)
    ids_BT = tokens.batch(TEXTS)
    embedding_BTD = student(ids_BT, output_hidden_states=False)[0]
    assert embedding_BTD.shape == (3, 10 if family == "roberta" else 12, 24)
    save_student(student, tmp_path / "s", tokenizer=tokens.files)
    loaded = load_student(tmp_path / "s")
    assert torch.equal(loaded(own_tokens(tmp_path / "s", loaded).batch(TEXTS))[0], embedding_BTD)
    assert own_tokens(tmp_path / "s", loaded).files == tokens.files
    assert (loaded.dtype, loaded.device.type, student_folder(tmp_path / "s")) == (torch.float32, "cpu", tmp_path / "s")
    names = {name.split(".")[0] for name, _ in student.named_parameters()}
    assert names == {"encoder", "final_projection"} and not any("pooler" in name for name in student.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_padded_does_not_change_what_the_text_gives(family, sources, teacher):
    student = make(sources[family], teacher).eval()
    tokens = own_tokens(sources[family], student)
    ids_BT = tokens.batch(["a red dog"])
    length = int(student.mask_of(ids_BT).sum())
    assert 0 < length < ids_BT.shape[1]
    padded_BTD = student(ids_BT)[0]
    with pytest.warns(UserWarning, match=rf"trained at {ids_BT.shape[1]} text tokens, found {length}: pass"):
        alone_BTD = student(ids_BT[:, :length], torch.ones(1, length, dtype=torch.int64))[0]
    assert torch.allclose(padded_BTD[:, :length], alone_BTD, atol=1e-5)
    assert torch.isfinite(padded_BTD).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_weights_are_taken_and_random_ones_are_not(family, sources, teacher):
    saved = load_file(sources[family] / "model.safetensors")
    found = make(sources[family], teacher).encoder.get_input_embeddings().weight
    assert any(value.shape == found.shape and torch.equal(value, found) for value in saved.values())
    random = make(sources[family], teacher, init="random").encoder.get_input_embeddings().weight
    again = make(sources[family], teacher, init="random").encoder.get_input_embeddings().weight
    other = make(sources[family], teacher, init="random", seed=1).encoder.get_input_embeddings().weight
    assert not torch.equal(random, found) and torch.equal(random, again) and not torch.equal(random, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_falls_everywhere_or_nowhere(family, sources, teacher):
    ids_BT = own_tokens(sources[family], make(sources[family], teacher)).batch(["a red dog"])
    without = make(sources[family], teacher, dropout=0.0).train()
    assert torch.equal(without(ids_BT)[0], without(ids_BT)[0])
    student = make(sources[family], teacher, dropout=0.4).train()
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    assert not torch.equal(student.encoder(ids_BT)[0], student.encoder(ids_BT)[0])


def test_dropout_probabilities_are_replaced_wherever_they_stand_and_nothing_else_is():
    settings = {"attn_pdrop": 0.1, "classifier_dropout": None, "use_dropout": True, "encoder": {"dropout_rate": 0}}
    replaced = {"attn_pdrop": 0.3, "classifier_dropout": None, "use_dropout": True, "encoder": {"dropout_rate": 0.3}}
    assert with_dropout({**settings, "d": 0.1}, 0.3) == {**replaced, "d": 0.1}


@pytest.mark.parametrize(
    ("pad_is_end", "rows", "mask"),
    [
        (
            False,
            [[2, 5, 3, 0, 0], [2, 0, 3, 0, 0], [0, 0, 0, 0, 0]],
            [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
        ),
        (
            True,
            [[2, 5, 0, 0, 0], [0, 5, 4, 4, 0], [0, 0, 0, 0, 0]],
            [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
        ),
    ],
)
def test_the_mask_is_told_from_the_padding_behind_the_text(pad_is_end, rows, mask, sources, teacher):
    student = make(sources["bert"], teacher)
    student.config.pad_is_end = pad_is_end
    assert student.mask_of(torch.tensor(rows)).tolist() == mask


@pytest.mark.thorough
def test_the_text_length_is_the_teachers_or_what_the_positions_reach_to(sources, teacher):
    reach = {family: make(sources[family], teacher).config.longest_text for family in FAMILIES}
    assert reach == {
        "bert": 20, "distilbert": 512, "roberta": 10, "clip_text_model": 16, "bart": 20, "modernbert": 8192,
        "mt5": None, "gpt2": 20, "qwen3": 32768,
    }  # fmt: skip
    assert text_length_remark(make(sources["bart"], teacher), teacher) is None
    student = make(sources["roberta"], teacher)
    assert text_length_remark(student, teacher) == (
        "the student has positions for 10 text tokens, but the cache's embeddings have 12: longer prompts are "
        "truncated; use the student with max_sequence_length=10"
    )
    assert student.config.text_length == 10 == longest_text(student.encoder)
    with pytest.raises(ValueError, match=r"positions for 10 text tokens, found 12: pass max_sequence_length=10$"):
        student(torch.ones(1, 12, dtype=torch.int64))


def test_of_a_model_of_text_and_images_it_is_the_text_model(sources, teacher, tmp_path):
    shutil.copytree(sources["clip_text_model"], tmp_path / "clip")
    vision = CLIPVisionConfig(**SIZE, image_size=8, patch_size=4)
    config = CLIPConfig(
        text_config=CLIPTextConfig.from_pretrained(tmp_path / "clip").to_dict(), vision_config=vision.to_dict()
    )
    torch.manual_seed(4)
    whole = CLIPModel(config)
    whole.save_pretrained(tmp_path / "clip")
    student = make(tmp_path / "clip", teacher).eval()
    assert type(student.encoder).__name__ == "CLIPTextModel"
    ids_BT = own_tokens(tmp_path / "clip", student).batch(TEXTS)
    mask_BT = student.mask_of(ids_BT)
    expected_BTD = whole.eval().text_model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    assert torch.allclose(student.encoder(ids_BT, attention_mask=mask_BT).last_hidden_state, expected_BTD, atol=1e-6)


def test_of_a_checkpoint_with_a_head_and_without_a_pooler_the_encoder_is_taken(sources, teacher, tmp_path):
    shutil.copytree(sources["bert"], tmp_path / "bert")
    torch.manual_seed(4)
    masked = BertForMaskedLM(BertConfig.from_pretrained(tmp_path / "bert"))
    masked.save_pretrained(tmp_path / "bert")
    weights = make(tmp_path / "bert", teacher).encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in masked.bert.state_dict().items())


def test_a_t5_of_the_teachers_vocabulary_reads_the_caches_tokens_and_a_smaller_one_its_own(sources, teacher, tmp_path):
    shutil.copytree(sources["mt5"], tmp_path / "t5")
    rewrite_config(tmp_path / "t5", model_type="t5")
    plain = make(tmp_path / "t5", teacher, init="random")
    assert isinstance(plain, SecondcastStudent) and own_tokens(tmp_path / "t5", plain) is None
    wider = teacher.model_copy(update={"text_encoder_config": {"vocab_size": 32128}})
    assert isinstance(make(tmp_path / "t5", wider, init="random"), EncoderStudent)


def test_it_is_trained_on_for_another_teacher_with_its_weights(sources, teacher, tmp_path):
    student = make(sources["bert"], teacher)
    student.config.trained_guidance = [2.0, 5.0]
    save_student(student, tmp_path / "s", tokenizer=own_tokens(sources["bert"], student).files)
    shorter = teacher.model_copy(update={"text_length": 9})
    again = make(tmp_path / "s", shorter, dropout=0.3, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))
    assert again.config.text_length == 9 and not hasattr(again.config, "trained_guidance")
    assert again.config.encoder_config["hidden_dropout_prob"] == 0.3 == again.final_projection[2].p
    fresh = make(tmp_path / "s", shorter, init="random", seed=9)
    assert not torch.equal(fresh.final_projection[0].weight, student.final_projection[0].weight)
    with pytest.raises(
        StudentError, match="s has embeddings of width 24, but this teacher reads 7: a student only fits the teacher"
    ):
        make(tmp_path / "s", teacher.model_copy(update={"text_width": 7}))
    with pytest.raises(StudentError, match="has embeddings of width 24, but this teacher reads 4096"):
        check_fits(student, 4096, "s")


def test_untrained_has_the_shape_and_other_weights(sources, teacher):
    student = make(sources["bart"], teacher)
    other = untrained_like(student, seed=3)
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in student.named_parameters()}
    assert not torch.equal(other.final_projection[0].weight, student.final_projection[0].weight) and not other.training


def test_a_saved_student_states_the_class_that_it_carries_and_needs_no_hub(sources, teacher, tmp_path):
    student = make(sources["bert"], teacher)
    save_student(student, tmp_path / "s", tokenizer={})
    config = json.loads((tmp_path / "s/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "encoder_student_network.EncoderStudentConfig",
        "AutoModel": "encoder_student_network.EncoderStudent",
    }
    assert config["encoder_config"]["model_type"] == "bert" and str(sources["bert"]) not in json.dumps(config)
    assert (tmp_path / "s/encoder_student_network.py").is_file() and not (tmp_path / "s/student_network.py").exists()
    assert EncoderStudentConfig.from_pretrained(tmp_path / "s").encoder_config == student.config.encoder_config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViTConfig(**SIZE, image_size=8, patch_size=4), r"x is a 'vit' model without a last hidden state for tok"),
        (WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1), r"is a 'whisper' model without a last h"),
    ],
)
def test_what_is_no_text_encoder_is_refused(config, message, sources, teacher, tmp_path):
    shutil.copytree(sources["bert"], tmp_path / "x")
    config.save_pretrained(tmp_path / "x")
    with pytest.raises(StudentError, match=message):
        make(tmp_path / "x", teacher, init="random")


def test_configurations_that_do_not_fit_are_refused(sources, teacher, tmp_path):
    def broken(name, **changes):
        shutil.copytree(sources["bert"], tmp_path / name)
        rewrite_config(tmp_path / name, **changes)
        return tmp_path / name

    with pytest.raises(StudentError, match="has token ids up to 84, but its encoder has a vocabulary of 50: give a"):
        make(broken("small", vocab_size=50), teacher, init="random")
    with pytest.raises(StudentError, match=r"has no configuration that transformers can read \(.*\): give a text enc"):
        make(broken("unknown", model_type="nix"), teacher)
    with pytest.raises(StudentError, match=r"is a 'bert' model without a last .*\(.*\): give a text enc"):
        make(broken("heads", num_attention_heads=3), teacher, init="random")
    with pytest.raises(StudentError, match=r"config.json has no model_type, expected the configuration of a text enc"):
        make(broken("none", model_type=None), teacher)


def test_weights_that_are_missing_or_pickled_are_refused(sources, teacher, tmp_path):
    shutil.copytree(sources["bert"], tmp_path / "x")
    weights = load_file(tmp_path / "x/model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file({n: v for n, v in weights.items() if n != name}, tmp_path / "x/model.safetensors", {"format": "pt"})
    with pytest.raises(
        StudentError, match=rf"x cannot be loaded: 1 of the 23 tensors of BertModel is missing \({name}\)"
    ):
        make(tmp_path / "x", teacher)
    (tmp_path / "x/model.safetensors").rename(tmp_path / "x/pytorch_model.bin")
    with pytest.raises(
        StudentError, match=r"x cannot be loaded: it has no model.safetensors, only pytorch_model.bin: expect"
    ):
        make(tmp_path / "x", teacher)


def test_a_saved_student_that_is_damaged_is_refused(sources, teacher, tmp_path):
    save_student(make(sources["bert"], teacher), tmp_path / "s", tokenizer={})
    rewrite_config(tmp_path / "s", encoder_config={"model_type": "nix"})
    with pytest.raises(StudentError, match=r"s cannot be loaded: .* nix.* \.\.\.; export the run again$"):
        load_student(tmp_path / "s")


def test_weights_named_as_another_transformers_names_them_are_the_same_student(sources, teacher, tmp_path):
    student = make(sources["clip_text_model"], teacher).eval()
    save_student(student, tmp_path / "s", tokenizer=None)
    file = tmp_path / "s/model.safetensors"
    tensors = load_file(file)
    assert not any("text_model" in name for name in tensors) and len(tensors) > 2
    # transformers 4 and 5.0 have one level more in CLIP's text model.
    older = {re.sub("^encoder[.]", "encoder.text_model.", name): tensor for name, tensor in tensors.items()}
    save_file(older, file, metadata={"format": "pt"})
    loaded = load_student(tmp_path / "s")
    ids_BT = torch.tensor([[0, 3, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(loaded(ids_BT)[0], student(ids_BT)[0])
    # And the other way round.
    newer = [name for name in tensors if name.startswith("encoder.")]
    found = {"missing_keys": [name for name in older if name.startswith("encoder.")], "unexpected_keys": newer}
    assert sorted(_other_names(found).values()) == sorted(found["missing_keys"])
    save_student(loaded, tmp_path / "again", tokenizer=None)
    assert torch.equal(load_student(tmp_path / "again")(ids_BT)[0], student(ids_BT)[0])


def test_an_export_that_lost_weights_is_refused_by_its_own_class(sources, teacher, tmp_path):
    save_student(make(sources["bert"], teacher), tmp_path / "s", tokenizer=None)
    file = tmp_path / "s/model.safetensors"
    tensors = load_file(file)
    lost = "encoder.embeddings.word_embeddings.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"s lacks 1 weights of the student and has 0 others, among them {lost}: "):
        EncoderStudent.from_pretrained(tmp_path / "s")
