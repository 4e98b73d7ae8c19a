"""A saved student as a function of prompts, with the tokenizer that it was trained with."""

import pytest
import torch

from secondcast.models.student.prompt_encoder import PromptEncoder
from secondcast.models.student.student import new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.reader import Cache
from tests.models.student.encoders import make_encoder_folder
from tests.trainer.conftest import cache_folder, t5_config

__all__ = ["cache_folder", "t5_config"]
CPU = torch.device("cpu")


@pytest.fixture
def made(cache_folder):
    """A new student of a source that fits the recorded teacher."""
    teacher = Cache.open(cache_folder).manifest.teacher
    return lambda source: new_student(str(source), teacher, init="random", dropout=0.5, seed=0)


def test_a_student_with_a_tokenizer_of_its_own_reads_prompts_by_it(tmp_path, made):
    source = make_encoder_folder(tmp_path / "bert", "bert", weights=False)
    student = made(source)
    tokens = own_tokens(source, student)
    save_student(student, tmp_path / "saved", tokenizer=tokens.files)
    encoder = PromptEncoder(tmp_path / "saved", CPU)
    assert torch.equal(encoder.token_ids(["a red dog", "a car"]), tokens.batch(["a red dog", "a car"]))
    assert encoder.token_ids("a red dog").shape == (1, encoder.text_length)


def test_embeddings_are_those_of_the_network_without_dropout(tmp_path, made, cache_folder, t5_config):
    cache, student = Cache.open(cache_folder), made(t5_config)
    save_student(student, tmp_path / "saved", tokenizer=cache.tokenizer_files)
    encoder = PromptEncoder(tmp_path / "saved", CPU)
    token_ids_T = torch.from_numpy(cache.padded_token_ids(2))
    with torch.no_grad():
        expected_BTD = student.eval()(token_ids_T[None])[0]
    found_BTD = encoder(cache.prompts[2].text)
    assert torch.equal(found_BTD, expected_BTD) and not found_BTD.requires_grad
    assert torch.equal(encoder([cache.prompts[2].text]), found_BTD)


def test_a_student_without_a_readable_tokenizer_is_an_error_that_names_the_folder(tmp_path, made, t5_config):
    folder = tmp_path / "saved"
    save_student(made(t5_config), folder, tokenizer=None)
    with pytest.raises(StudentError, match=f"{folder} has a student without tokenizer, expected tokenizer.json or"):
        PromptEncoder(folder, CPU)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(StudentError, match=f"the tokenizer of the student {folder} cannot be read: ") as caught:
        PromptEncoder(folder, CPU)
    assert "\n" not in str(caught.value)
