"""Initial students are parts of the teacher's own encoder, and start much closer to it than random ones."""

import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from secondcast.models.student.initial.encoder_weights import EncoderWeights
from secondcast.models.student.initial.initial_student import TokenIds
from secondcast.models.student.initial.projection import RIDGE, context_error, fit_projection
from secondcast.models.student.initial.size import Size
from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.models.student.student import new_student
from secondcast.models.teacher.folder import part_source
from secondcast.pocket import STUDENTS_FOLDER
from secondcast.storage_schemas.errors import PromptsError, SettingsError, StudentError, TeacherError
from secondcast.trainer.losses.context import context_loss
from tests.models.student.initial.making import SETTINGS, maker_in, pocket_encoder, pocket_ids, pocket_size

OWN = Size.of_teacher(pocket_encoder().weights.config)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Statistics of 128 prompts, collected once for all sizes."""
    work = WorkFolder(tmp_path_factory.mktemp("initial") / "out")
    with work.opened(SETTINGS):
        yield work


IDS = pocket_ids(128, 32)


def teachers_embedding_BTD(ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pocket_encoder().load()(input_ids=ids_BT).last_hidden_state


@pytest.mark.thorough
def test_a_cut_of_the_teachers_own_size_is_the_teacher(work):
    made = maker_in(work, OWN, IDS).cut()
    wanted_BTD = teachers_embedding_BTD(IDS.held_NT)
    with torch.no_grad():
        hidden_BTD = made.student.encoder(input_ids=IDS.held_NT).last_hidden_state
    # The same signal in another orthogonal basis, without the weight of the last norm: fp32 through four layers.
    found_BTD = torch.linalg.lstsq(hidden_BTD.flatten(0, 1).double(), wanted_BTD.flatten(0, 1).double())
    fitted_ND = hidden_BTD.flatten(0, 1).double() @ found_BTD.solution
    assert float((fitted_ND - wanted_BTD.flatten(0, 1)).abs().max()) < 1e-3 * float(wanted_BTD.abs().max())
    # The projection passes 128 directions, as many as the transformer reads. A ridge of share r of the mean energy
    # loses at most r / 4 of it per direction.
    context_BTI = wanted_BTD @ pocket_encoder().context_ID.T
    assert made.error < RIDGE * float(context_BTI.square().mean())
    assert made.parts == "layers 0,1,2,3, heads 0,1,2,3"


def test_the_error_is_the_trainers_context_loss(work):
    made = maker_in(work, pocket_size("tiny"), IDS).cut()
    with torch.no_grad():
        found_BTD = made.student(IDS.held_NT)[0]
    wanted = context_loss(found_BTD, teachers_embedding_BTD(IDS.held_NT), pocket_encoder().context_ID)
    assert made.error == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "most"), [("small", 0.85), ("base", 0.5)])
def test_a_cut_starts_closer_to_the_teacher_than_a_random_encoder_with_a_fitted_projection(work, size, most):
    maker = maker_in(work, pocket_size(size), IDS)
    cut = maker.cut()
    _, fitted, held = maker.collected
    random = new_student(
        str(STUDENTS_FOLDER / size), pocket_encoder().identity, init="random", dropout=0.0, seed=0
    ).eval()
    untrained = context_error(random, held, pocket_encoder().context_ID)
    fit_projection(random, fitted, pocket_encoder().context_ID)
    with_projection = context_error(random, held, pocket_encoder().context_ID)
    assert cut.error < most * with_projection and with_projection < untrained


@pytest.mark.thorough
def test_a_shallow_student_is_made_of_the_teachers_own_layers(work):
    made = maker_in(work, pocket_size("small"), IDS, kind="shallow").shallow(2)
    assert made.parts.startswith("layers 0,") and made.student.config.d_model == OWN.width
    weights = pocket_encoder().weights
    first = made.student.encoder.encoder.block[0].layer[0].SelfAttention
    assert torch.equal(first.q.weight, weights.attention(0)["q"])
    assert torch.equal(made.student.encoder.shared.weight, weights.embedding_VD())


@pytest.mark.thorough
def test_auto_keeps_the_best_and_leaves_out_what_is_larger_than_the_size(work):
    said = []

    class Listening:
        say = staticmethod(said.append)
        bar = maker_in(work, OWN, IDS)._progress.bar

    made, best = maker_in(work, pocket_size("tiny"), IDS, kind="auto", progress=Listening()).make(None)
    assert [one.kind for one in made] == ["cut"] and best is made[0]
    parameters = made[0].facts["parameters"]
    assert said == [
        f"shallow: left out, 1 layer at the teacher's width has more than the {parameters:,} parameters of cut"
    ]
    made, best = maker_in(work, Size(layers=2, heads=4, width=256, units=384), IDS, kind="auto").make(None)
    assert [one.kind for one in made] == ["cut", "shallow"] and best.error == min(one.error for one in made)
    assert made[1].facts["parameters"] <= made[0].facts["parameters"]


def write_t5(folder: Path, **changes: str) -> T5EncoderModel:
    """A random T5 of the size `tiny`."""
    torch.manual_seed(3)
    config = json.loads((STUDENTS_FOLDER / "tiny/config.json").read_text())
    model = T5EncoderModel(T5Config.from_dict({**config, **changes}))
    model.save_pretrained(folder)
    return model


def test_a_pretrained_t5_gets_a_fitted_projection(work, tmp_path):
    given = write_t5(tmp_path / "t5")
    maker = maker_in(work, pocket_size("tiny"), IDS, kind="pretrained")
    made = maker.pretrained(str(tmp_path / "t5"))
    assert torch.equal(made.student.encoder.shared.weight, given.shared.weight)
    # As good as the mean embedding at least, which the position bias and the end token make reachable.
    embedding_BTD = teachers_embedding_BTD(IDS.held_NT)
    context_BTI = embedding_BTD @ pocket_encoder().context_ID.T
    assert made.error < 0.5 * float(context_BTI.square().mean())


def test_a_pretrained_t5_without_gates_is_refused(work, tmp_path):
    write_t5(tmp_path / "t5", feed_forward_proj="relu")
    with pytest.raises(StudentError, match=r"t5 is a 't5' model with feed_forward_proj = 'relu', expected 't5' with"):
        maker_in(work, OWN, IDS, kind="pretrained").pretrained(str(tmp_path / "t5"))


def test_a_teacher_without_gates_is_refused(tmp_path):
    write_t5(tmp_path / "t5", feed_forward_proj="relu")
    config = json.loads((tmp_path / "t5/config.json").read_text())
    with pytest.raises(TeacherError, match=r"t5 is a 't5' model with feed_forward_proj = 'relu', expected 't5' with"):
        EncoderWeights.open(tmp_path / "t5", config, part_source(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({"layers": 5}, "5 layers, expected from 1 to 4"),
        ({"heads": 5}, "5 heads, expected from 1 to 4"),
        ({"width": 257}, "a width of 257, expected from 1 to 256"),
        ({"units": 385}, "385 feed-forward units, expected from 1 to 384"),
        ({"layers": 0}, "0 layers, expected from 1 to 4"),
    ],
)
def test_a_size_above_the_teachers_is_refused(tmp_path, change, asked):
    size = Size(**{**vars(OWN), **change})
    with pytest.raises(SettingsError, match=f"--size asks for {asked}, the teacher's: an initial student is a part of"):
        maker_in(WorkFolder(tmp_path / "out"), size, IDS)


def test_fewer_tokens_than_the_width_are_refused_without_padding(tmp_path):
    few = TokenIds(fitted_NT=IDS.fitted_NT[:3], held_NT=IDS.held_NT)
    tokens = int((few.fitted_NT != 0).sum())
    assert tokens < 64 <= few.fitted_NT.numel()
    with pytest.raises(
        PromptsError, match=f"the 3 prompts for the statistics have {tokens} tokens, expected at least 64, the width"
    ):
        maker_in(WorkFolder(tmp_path / "out"), pocket_size("small"), few)


def test_heads_of_another_width_become_whole_heads_of_the_teacher():
    # Two heads of 16 values are one of the teacher's 32.
    assert pocket_size("tiny") == Size(layers=2, heads=1, width=32, units=64)
    assert Size.in_proportion(2, 128, pocket_encoder().weights.config) == Size(layers=2, heads=2, width=128, units=192)
