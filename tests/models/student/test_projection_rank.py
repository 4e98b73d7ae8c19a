"""The low-rank projection: fewer parameters, kept by what trains on, and none of it in students without it."""

import copy
import json

import pytest
import torch
from torch.nn.functional import linear

from secondcast.models.cost.counted import student_cost
from secondcast.models.student.distillt5 import with_full_projection
from secondcast.models.student.initial.projection import _factors, ridge
from secondcast.models.student.projection_rank import check_fitted_rank, check_rank
from secondcast.models.student.student import load_student, new_student, save_student
from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.settings import TrainFlags
from tests.models.cost.test_cost import outline
from tests.models.student.encoders import make_encoder_folder
from tests.models.student.test_student import config_folder, make, teacher  # noqa: F401

IDS_BT = torch.tensor([[5, 3, 1, 0, 0], [4, 4, 4, 9, 1]])


@pytest.fixture
def low(config_folder, teacher):  # noqa: F811
    return make(config_folder, teacher, projection_rank=2, dropout=0.0).eval()


def test_the_last_matrix_is_a_product_of_two(low):
    shapes = {name: tuple(p.shape) for name, p in low.final_projection.named_parameters()}
    assert shapes == {"0.weight": (6, 8), "3.weight": (2, 6), "4.weight": (6, 2)}


def test_a_student_without_it_is_saved_as_before(config_folder, teacher, tmp_path):  # noqa: F811
    save_student(make(config_folder, teacher), tmp_path / "s", tokenizer=None)
    assert not {"projection_rank", "quantization"} & json.loads((tmp_path / "s/config.json").read_text()).keys()
    # The id of a run is a digest of these values.
    assert "projection_rank" not in TrainFlags.from_flags(student="s", steps=1).settings().json_value()
    given = TrainFlags.from_flags(student="s", steps=1, projection_rank=2).settings()
    assert given.json_value()["projection_rank"] == given.flat()["projection_rank"] == 2


def test_it_is_saved_loaded_and_trained_on(low, teacher, tmp_path):  # noqa: F811
    save_student(low, tmp_path / "s", tokenizer=None)
    assert torch.equal(load_student(tmp_path / "s")(IDS_BT)[0], low(IDS_BT)[0])
    for rank in (None, 2):
        again = make(tmp_path / "s", teacher, projection_rank=rank)
        assert torch.equal(again.final_projection[4].weight, low.final_projection[4].weight)
    assert make(tmp_path / "s", teacher, init="random").config.projection_rank == 2
    with pytest.raises(
        SettingsError, match=r"--projection-rank is 1, but \S+/s is a student with a projection of rank 2, which it ke"
    ):
        make(tmp_path / "s", teacher, projection_rank=1)


def test_a_student_with_its_own_tokenizer_has_it_too(teacher, tmp_path):  # noqa: F811
    source = make_encoder_folder(tmp_path / "bert", "bert")
    student = new_student(str(source), teacher, init="random", dropout=0.0, seed=0, projection_rank=2)
    assert [tuple(p.shape) for p in student.final_projection.parameters()] == [(6, 16), (2, 6), (6, 2)]
    save_student(student, tmp_path / "s", tokenizer=None)
    assert load_student(tmp_path / "s").config.projection_rank == 2


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_that_saves_nothing_is_refused(config_folder, teacher, rank):  # noqa: F811
    with pytest.raises(SettingsError, match=rf"--projection-rank is {rank}, expected 1 to 2: the text width is 6, and"):
        make(config_folder, teacher, projection_rank=rank)
    with pytest.raises(SettingsError, match="--projection-rank is 2048, expected 1 to 2047: the text width is 4096"):
        student_cost("small", outline(), 2048)
    check_rank(2047, 4096)


def test_a_rank_above_what_the_transformer_reads_cannot_be_fitted():
    check_fitted_rank(128, 128)
    with pytest.raises(SettingsError) as error:
        check_fitted_rank(129, 128)
    assert str(error.value) == (
        "--projection-rank is 129, expected at most 128: the transformer reads no more directions of the embedding; "
        "give a smaller rank, or none"
    )


def test_a_plan_refuses_another_rank_than_that_of_the_student(low, tmp_path):
    save_student(low, tmp_path / "s", tokenizer=None)
    with pytest.raises(SettingsError, match="s is a student with a projection of rank 2, which it keeps: omit the opt"):
        student_cost(str(tmp_path / "s"), outline(), 64)


def test_it_is_multiplied_out_for_the_published_format(low):
    full = with_full_projection(low)
    assert not hasattr(full.config, "projection_rank") and full.final_projection[3].weight.shape == (6, 6)
    assert torch.allclose(full(IDS_BT)[0], low(IDS_BT)[0], atol=1e-5)
    assert with_full_projection(full) is full


def test_a_low_rank_saves_of_flux_what_two_factors_are_smaller():
    plain, low = (student_cost("small", outline(), rank).parameters for rank in (None, 256))
    assert plain - low == 4096**2 - 2 * 256 * 4096


def regression(rank: int) -> tuple[torch.Tensor, ...]:
    """Features, targets, a text projection, and the coefficients of the full and of the low-rank regression."""
    generator = torch.Generator().manual_seed(0)
    feature_NR, mix_RD, noise_ND, context_ID = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((500, 12), (12, 10), (500, 10), (6, 10))
    )
    target_ND = feature_NR @ mix_RD + noise_ND
    cross_RD = feature_NR.T @ target_ND
    full_RD = ridge(feature_NR.T @ feature_NR, cross_RD)
    down_KR, up_DK = _factors(full_RD, cross_RD, context_ID, rank)
    assert down_KR.shape == (rank, 12) and up_DK.shape == (10, rank)
    return feature_NR, target_ND, context_ID, full_RD, (up_DK @ down_KR).T


def context_loss(found: tuple[torch.Tensor, ...], coefficients_RD: torch.Tensor) -> float:
    feature_NR, target_ND, context_ID, *_ = found
    return float(linear(feature_NR @ coefficients_RD - target_ND, context_ID).square().mean())


def test_factors_of_the_transformers_own_width_lose_nothing_that_it_reads():
    found = regression(rank=6)
    assert context_loss(found, found[4]) == pytest.approx(context_loss(found, found[3]), rel=1e-9)


def test_no_nearby_factors_of_the_same_rank_have_a_lower_context_error():
    found = regression(rank=3)
    best = context_loss(found, found[4])
    truncated = copy.deepcopy(found[3])
    u, s, v = torch.linalg.svd(truncated, full_matrices=False)
    assert best < context_loss(found, u[:, :3] * s[:3] @ v[:3])
    generator = torch.Generator().manual_seed(1)
    u, s, v = torch.linalg.svd(found[4], full_matrices=False)
    for _ in range(20):
        other = u[:, :3] + 0.05 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
        # The ridge of 1e-4 moves the optimum by less than this.
        assert context_loss(found, other * s[:3] @ v[:3]) > best * (1 - 1e-6)
