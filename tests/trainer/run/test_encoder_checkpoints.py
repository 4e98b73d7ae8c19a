"""A student that is not T5 is optimised, averaged and restored as a T5 is: a resumed run is the unbroken one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from secondcast.models.student.folder import student_folder
from secondcast.models.student.student import load_student, new_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import find_teacher
from secondcast.storage_schemas.errors import RunError
from secondcast.storage_schemas.io.digests import digest
from secondcast.trainer.optimizer import restore_optimizer
from secondcast.trainer.run.checkpoints.loading import load_checkpoint
from secondcast.trainer.run.checkpoints.reading import checksums
from secondcast.trainer.run.checkpoints.saving import save_checkpoint
from secondcast.trainer.run.train_state import TrainState
from secondcast.trainer.settings import TrainFlags
from tests.models.student.encoders import make_encoder_folder
from tests.models.weights.damaged_weights import rewrite

SETTINGS = TrainFlags.from_flags(student="x", steps=4, learning_rate=1e-2, ema_decay=0.9).settings()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["bert", "bart", "mt5"])
def source(request, tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("encoders") / request.param, request.param)


def begin(source, dev_teacher, *, fused=None):
    opened = find_teacher(str(dev_teacher), ())
    identity = opened.identity(text_length=opened.text_length, hashed=False)
    student = new_student(str(source), identity, init="auto", dropout=0.2, seed=0)
    train_state = TrainState(student, SETTINGS, CPU)
    if fused:
        groups = train_state.optimizer.param_groups
        groups = [{key: group[key] for key in ("params", "weight_decay", "factor")} for group in groups]
        train_state.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return train_state


def step(number, train_state, ids_BT):
    torch.manual_seed(number)
    train_state.student.train()
    train_state.optimizer.zero_grad()
    train_state.student(ids_BT)[0].square().mean().backward()
    train_state.update(number)


@pytest.mark.thorough
@pytest.mark.parametrize("fused", [None, True])
def test_resumed_it_ends_with_the_weights_of_an_unbroken_run(source, dev_teacher, tmp_path, fused):
    unbroken = begin(source, dev_teacher, fused=fused)
    tokens = own_tokens(source, unbroken.student)
    ids_BT = tokens.batch(["a red dog", "two cats"])
    for number in (0, 1):
        step(number, unbroken, ids_BT)
    save_checkpoint(tmp_path, 2, unbroken, tokens.files, {"best": None}, pytest.fail)
    for number in (2, 3):
        step(number, unbroken, ids_BT)
    resumed = begin(source, dev_teacher, fused=fused)
    _, state = load_checkpoint(tmp_path, resumed, pytest.fail)
    assert state["step"] == 2
    for number in (2, 3):
        step(number, resumed, ids_BT)
    for ours, expected in ((resumed.student, unbroken.student), (resumed.eval_student, unbroken.eval_student)):
        pairs = zip(ours.state_dict().items(), expected.state_dict().values(), strict=True)
        assert [name for (name, value), wanted in pairs if not torch.equal(value, wanted)] == []
    saved = student_folder(tmp_path)
    assert own_tokens(saved, load_student(saved)).files == tokens.files


def test_every_parameter_is_trained_and_only_the_encoder_decays(source, dev_teacher):
    train_state = begin(source, dev_teacher)
    student = train_state.student
    before = {name: value.clone() for name, value in student.named_parameters()}
    step(0, train_state, own_tokens(source, student).batch(["a red dog", "two cats"]))
    still = {name for name, value in student.named_parameters() if torch.equal(value, before[name])}
    # Rounding aside, a key's bias moves no attention: softmax takes away what is added to a whole row.
    assert {name for name in still if not name.endswith("bias")} == set()
    decays = {id(p): group["weight_decay"] for group in train_state.optimizer.param_groups for p in group["params"]}
    assert {name.split(".")[0]: decays[id(p)] for name, p in student.named_parameters()} == {
        "encoder": 1e-3,
        "final_projection": 0.0,
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_encoder_folder(tmp_path_factory.mktemp("one-encoder") / "bert", "bert")


@pytest.fixture(scope="module")
def made(bert, dev_teacher, tmp_path_factory):
    """A run with one checkpoint and an average, and what to restore it into."""
    train_state = begin(bert, dev_teacher)
    tokens = own_tokens(bert, train_state.student)
    step(0, train_state, tokens.batch(["a red dog", "two cats"]))
    run = tmp_path_factory.mktemp("saved") / "run"
    save_checkpoint(run, 1, train_state, tokens.files, {}, pytest.fail)
    return run, train_state


@pytest.fixture
def saved(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run") / "checkpoint-00000001"


def refusal(run, made):
    _, train_state = made
    with pytest.raises(RunError) as caught:
        load_checkpoint(run, train_state, [].append)
    return str(caught.value)


def whole_again(checkpoint):
    """Write the checksums of a checkpoint whose files were changed."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    found = checksums(checkpoint)
    write_state(checkpoint, state | {"files": {name: found[name] for name in state["files"]}})


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
    with pytest.raises(RunError) as caught:
        load_checkpoint(saved.parent, begin(other, dev_teacher), [].append)
    assert str(caught.value).startswith(f"{saved} cannot be loaded: ") and (
        "tensors of the student to be trained are missing (encoder." in str(caught.value)
        and "config.json has 2 blocks in encoder." in str(caught.value)
        and str(caught.value).endswith(", the file has 1; give the --student of the run, or a new run folder")
    )
    assert saved.is_dir()


def test_a_fused_optimizer_counts_its_steps_where_the_weights_are(source, dev_teacher):
    made = begin(source, dev_teacher, fused=True)
    elsewhere = made.student.to("meta")
    tensors = {f"step/{name}": torch.tensor(3.0) for name, _ in elsewhere.named_parameters()}
    restore_optimizer(elsewhere, made.optimizer, tensors)
    places = {state["step"].device.type for state in made.optimizer.state.values()}
    assert places == {"meta"}
    made = begin(source, dev_teacher)
    restore_optimizer(made.student.to("meta"), made.optimizer, tensors)
    assert {state["step"].device.type for state in made.optimizer.state.values()} == {"cpu"}
