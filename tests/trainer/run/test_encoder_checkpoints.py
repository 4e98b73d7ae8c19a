"""A student that is not T5 is optimised, averaged and restored as a T5 is: a resumed run is the unbroken one."""

import pytest
import torch

from secondcast.models.student.student import load_student, new_student, student_folder
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.trainer.optimizer import Average, make_optimizer
from secondcast.trainer.run.checkpoints import load_checkpoint, save_checkpoint
from secondcast.trainer.settings import TrainFlags
from tests.models.student.encoders import make_encoder_folder

SETTINGS = TrainFlags.from_flags(student="x", steps=4, learning_rate=1e-2).settings()


@pytest.fixture(scope="module", params=["bert", "bart", "mt5"])
def source(request, tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("encoders") / request.param, request.param)


def begin(source, dev_teacher):
    opened = find_teacher(str(dev_teacher), ())
    identity = opened.identity(text_length=opened.text_length, hashed=False)
    student = new_student(str(source), identity, init="auto", dropout=0.2, seed=0)
    return student, make_optimizer(student, SETTINGS), Average(student, 0.9)


def step(number, student, optimizer, average, ids_BT):
    torch.manual_seed(number)
    student.train()
    optimizer.zero_grad()
    student(ids_BT)[0].square().mean().backward()
    optimizer.step()
    average.update(student, number)


def test_resumed_it_ends_with_the_weights_of_an_unbroken_run(source, dev_teacher, tmp_path):
    student, optimizer, average = begin(source, dev_teacher)
    tokens = own_tokens(source, student)
    ids_BT = tokens.batch(["a red dog", "two cats"])
    for number in (0, 1):
        step(number, student, optimizer, average, ids_BT)
    save_checkpoint(tmp_path, 2, student, optimizer, tokens.files, {}, averaged=average.student)
    for number in (2, 3):
        step(number, student, optimizer, average, ids_BT)
    again, its_optimizer, its_average = begin(source, dev_teacher)
    heard: list[str] = []
    _, state = load_checkpoint(tmp_path, again, its_optimizer, heard.append, averaged=its_average.student)
    assert state["step"] == 2 and not heard
    for number in (2, 3):
        step(number, again, its_optimizer, its_average, ids_BT)
    for ours, expected in ((again, student), (its_average.student, average.student)):
        pairs = zip(ours.state_dict().items(), expected.state_dict().values(), strict=True)
        assert [name for (name, value), wanted in pairs if not torch.equal(value, wanted)] == []
    saved = student_folder(tmp_path)
    assert own_tokens(saved, load_student(saved)).files == tokens.files


def test_every_parameter_is_trained_and_only_the_encoder_decays(source, dev_teacher):
    student, optimizer, average = begin(source, dev_teacher)
    before = {name: value.clone() for name, value in student.named_parameters()}
    step(0, student, optimizer, average, own_tokens(source, student).batch(["a red dog", "two cats"]))
    still = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    # Rounding aside, a key's bias moves no attention: softmax takes away what is added to a whole row.
    assert {name for name in still if not name.endswith("bias")} == set()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name.split(".")[0]: decays[id(p)] for name, p in student.named_parameters()} == {
        "encoder": 1e-3,
        "final_projection": 0.0,
    }
