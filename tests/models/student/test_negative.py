"""The teacher's embedding of the negative prompt in a student: given for its tokens, kept by saving, never trained."""

import pytest
import torch
from transformers import T5Config

from secondcast.models.student.quantizing import quantized
from secondcast.models.student.student import load_student, new_student, save_student, untrained_like
from secondcast.models.student.tokens import own_tokens
from tests.models.student.encoders import make_encoder_folder
from tests.models.student.test_student import CONFIG
from tests.storage_schemas.caches import some_manifest, some_prompts

LENGTH, WIDTH = 5, 24
NEGATIVE_TD = torch.linspace(-1, 1, LENGTH * WIDTH).view(LENGTH, WIDTH)
NEGATIVE, OTHER = [1, 0, 0, 0, 0], [5, 3, 1, 0, 0]


@pytest.fixture(scope="module")
def teacher():
    teacher = some_manifest(some_prompts(1)).teacher
    return teacher.model_copy(update={"text_length": LENGTH, "text_width": WIDTH})


@pytest.fixture(params=["t5", "bert"])
def student(request, teacher, tmp_path):
    if request.param == "t5":
        T5Config(**CONFIG).save_pretrained(tmp_path / "source")
    else:
        make_encoder_folder(tmp_path / "source")
    return new_student(str(tmp_path / "source"), teacher, init="auto", dropout=0.0, seed=0).eval()


def test_the_tokens_of_the_negative_prompt_get_its_embedding_and_others_the_students(student):
    ids_BT = torch.tensor([OTHER, NEGATIVE])
    own_BTD = student(ids_BT)[0]
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    found_BTD = student(ids_BT)[0]
    assert torch.equal(found_BTD[0], own_BTD[0]) and torch.equal(found_BTD[1], NEGATIVE_TD)
    student.put_negative(None)
    assert torch.equal(student(ids_BT)[0], own_BTD) and not hasattr(student.config, "negative_token_ids")
    assert not any("negative" in name for name in student.state_dict())


def test_at_another_text_length_the_student_gives_its_own(student):
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    with pytest.warns(UserWarning, match="trained at 5 text tokens, found 4"):
        short_BTD = student(torch.tensor([NEGATIVE[:4]]))[0]
    assert short_BTD.shape == (1, 4, WIDTH) and not torch.equal(short_BTD[0], NEGATIVE_TD[:4])


def test_it_is_saved_and_loaded_to_the_bit_and_is_in_no_gradient(student, tmp_path):
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    save_student(student, tmp_path / "s", tokenizer=None)
    loaded = load_student(tmp_path / "s")
    ids_BT = torch.tensor([OTHER, NEGATIVE])
    assert torch.equal(loaded(ids_BT)[0], student(ids_BT)[0])
    assert not any("negative" in name for name, _ in loaded.named_parameters())
    loaded(torch.tensor([NEGATIVE]))[0].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in loaded.parameters())


def test_an_untrained_student_of_the_same_shape_has_it_too(student):
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    other = untrained_like(student, seed=3)
    assert torch.equal(other(torch.tensor([NEGATIVE]))[0][0], NEGATIVE_TD)


def test_trained_on_it_takes_the_place_of_an_earlier_one(student, teacher, tmp_path):
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    tokens = own_tokens(tmp_path / "source", student)
    save_student(student, tmp_path / "s", tokenizer=tokens.files if tokens else None)
    again = new_student(str(tmp_path / "s"), teacher, init="pretrained", dropout=0.0, seed=0).eval()
    again.put_negative(OTHER, 2 * NEGATIVE_TD)
    found_BTD = again(torch.tensor([OTHER, NEGATIVE]))[0]
    assert torch.equal(found_BTD[0], 2 * NEGATIVE_TD) and not torch.equal(found_BTD[1], NEGATIVE_TD)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_student_gives_it_unchanged(kind, teacher, tmp_path):
    T5Config(**CONFIG).save_pretrained(tmp_path / "source")
    student = new_student(str(tmp_path / "source"), teacher, init="auto", dropout=0.0, seed=0).eval()
    student.put_negative(NEGATIVE, NEGATIVE_TD)
    save_student(quantized(student, kind), tmp_path / "s", tokenizer=None)
    assert torch.equal(load_student(tmp_path / "s")(torch.tensor([NEGATIVE]))[0][0], NEGATIVE_TD)
