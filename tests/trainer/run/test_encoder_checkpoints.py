"""A student that is not T5 is optimised, averaged and restored as a T5 is: a resumed run is the unbroken one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from secondcast.models.student.student import load_student, new_student, student_folder
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import RunError
from secondcast.storage_schemas.io.digests import digest
from secondcast.trainer.optimizer import EMA, make_optimizer
from secondcast.trainer.run.checkpoints import _checksum, load_checkpoint, restore_optimizer, save_checkpoint
from secondcast.trainer.settings import TrainFlags
from tests.models.student.encoders import make_encoder_folder
from tests.models.weights.damaged_weights import rewrite

SETTINGS = TrainFlags.from_flags(student="x", steps=4, learning_rate=1e-2).settings()


@pytest.fixture(scope="module", params=["bert", "bart", "mt5"])
def source(request, tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("encoders") / request.param, request.param)


def begin(source, dev_teacher, *, fused=None):
    opened = find_teacher(str(dev_teacher), ())
    identity = opened.identity(text_length=opened.text_length, hashed=False)
    student = new_student(str(source), identity, init="auto", dropout=0.2, seed=0)
    optimizer = make_optimizer(student, SETTINGS)
    if fused:
        groups = [{key: group[key] for key in ("params", "weight_decay", "factor")} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return student, optimizer, EMA(student, 0.9)


def step(number, student, optimizer, average, ids_BT):
    torch.manual_seed(number)
    student.train()
    optimizer.zero_grad()
    student(ids_BT)[0].square().mean().backward()
    optimizer.step()
    average.update(student, number)


@pytest.mark.thorough
@pytest.mark.parametrize("fused", [None, True])
def test_resumed_it_ends_with_the_weights_of_an_unbroken_run(source, dev_teacher, tmp_path, fused):
    student, optimizer, average = begin(source, dev_teacher, fused=fused)
    tokens = own_tokens(source, student)
    ids_BT = tokens.batch(["a red dog", "two cats"])
    for number in (0, 1):
        step(number, student, optimizer, average, ids_BT)
    state = {"best": None}
    save_checkpoint(tmp_path, 2, student, optimizer, tokens.files, state, pytest.fail, averaged=average.student)
    for number in (2, 3):
        step(number, student, optimizer, average, ids_BT)
    again, its_optimizer, its_average = begin(source, dev_teacher, fused=fused)
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


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("one-encoder") / "bert", "bert")


@pytest.fixture(scope="module")
def made(bert, dev_teacher, tmp_path_factory):
    """A run with one checkpoint and an average, and a student, optimizer and average to restore."""
    student, optimizer, average = begin(bert, dev_teacher)
    tokens = own_tokens(bert, student)
    step(0, student, optimizer, average, tokens.batch(["a red dog", "two cats"]))
    run = tmp_path_factory.mktemp("saved") / "run"
    save_checkpoint(run, 1, student, optimizer, tokens.files, {}, pytest.fail, averaged=average.student)
    return run, student, optimizer, average.student


@pytest.fixture
def saved(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run") / "checkpoint-00000001"


def refusal(run, made):
    _, student, optimizer, averaged = made
    with pytest.raises(RunError) as caught:
        load_checkpoint(run, student, optimizer, [].append, averaged=averaged)
    return str(caught.value)


def whole_again(checkpoint):
    """Write the checksums of a checkpoint whose files were changed."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    write_state(checkpoint, state | {"files": {name: _checksum(checkpoint / name) for name in state["files"]}})


def write_state(checkpoint, state):
    state.pop("digest")
    (checkpoint / "state.json").write_text(json.dumps({**state, "digest": digest(state)}))


DAMAGED = {
    "dropped": (lambda tensors, name: {n: t for n, t in tensors.items() if n != name}, "is missing"),
    "renamed": (lambda tensors, name: {f"{n}x" if n == name else n: t for n, t in tensors.items()}, "missing"),
    "reshaped": (lambda tensors, name: {**tensors, name: tensors[name].reshape(1, -1)}, "is of another shape"),
    "integers": (lambda tensors, name: {**tensors, name: tensors[name].int()}, "stored as I32"),
    "more": (lambda tensors, name: {**tensors, "more": torch.ones(1)}, "is unexpected"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("part", ["optimizer.safetensors", "trained.safetensors", "student/model.safetensors"])
def test_a_part_of_a_checkpoint_that_is_not_the_students_is_named(made, saved, part, damage):
    change, said = DAMAGED[damage]
    name = next(name for name in sorted(load_file(saved / part)) if not name.startswith("step/"))
    rewrite(saved / part, lambda tensors: change(tensors, name))
    whole_again(saved)
    heard = refusal(saved.parent, made)
    assert heard.startswith(f"{saved} cannot be read (") and said in heard, heard
    assert ("more" if damage == "more" else name) in heard and "\n" not in heard


def test_a_checkpoint_without_checksums_proves_nothing(made, saved):
    state = json.loads((saved / "state.json").read_bytes())
    del state["files"]
    write_state(saved, state)
    assert refusal(saved.parent, made).startswith(f"{saved} cannot be read (state.json lists no checksums)")


def test_a_checkpoint_of_another_student_is_refused_and_not_lost(bert, dev_teacher, saved, tmp_path):
    other = shutil.copytree(bert, tmp_path / "other")
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for file in other.glob("*.safetensors"):
        file.unlink()
    student, optimizer, average = begin(other, dev_teacher)
    with pytest.raises(RunError) as caught:
        load_checkpoint(saved.parent, student, optimizer, [].append, averaged=average.student)
    assert str(caught.value).startswith(f"{saved} cannot be loaded: ") and (
        "tensors of the student to be trained are missing (encoder." in str(caught.value)
        and "config.json has 2 blocks in encoder." in str(caught.value)
        and str(caught.value).endswith(", the file has 1; give the --student of the run, or a new run folder")
    )
    assert saved.is_dir()


def test_a_fused_optimizer_counts_its_steps_where_the_weights_are(source, dev_teacher):
    student, optimizer, _ = begin(source, dev_teacher, fused=True)
    elsewhere = student.to("meta")
    tensors = {f"step/{name}": torch.tensor(3.0) for name, _ in elsewhere.named_parameters()}
    restore_optimizer(elsewhere, optimizer, tensors)
    places = {state["step"].device.type for state in optimizer.state.values()}
    assert places == {"meta"}
    student, optimizer, _ = begin(source, dev_teacher)
    restore_optimizer(student.to("meta"), optimizer, tensors)
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}
