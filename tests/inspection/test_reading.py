"""What the transformer reads of an embedding: truncations by metrics, padding, gradients, and spreads of prompts."""

import json
import shutil

import numpy as np
import pytest
import torch

from secondcast.evaluation.on_cache import backbone_of
from secondcast.evaluation.open_loop import step_batches
from secondcast.evaluation.replaying import cached_embeddings
from secondcast.inspection.reading.gradients import measured_metric, random_signs
from secondcast.inspection.reading.reading import METRICS, read_embedding, spread_records
from secondcast.inspection.reading.settings import ReadingOptions, ranks_of_text
from secondcast.inspection.reading.spread import KINDS, PROMPTS_FOLDER, read_prompts, spread_fraction
from secondcast.inspection.reading.statistics import TokenStatistics, replace_padding
from secondcast.inspection.reading.truncation import Truncation, metric_root, row_space
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.pocket import PROMPTS_FOLDER as POCKET_PROMPTS
from secondcast.pocket.world import require_scene
from secondcast.storage_schemas.errors import NotInCacheError, SettingsError
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import CPU, build_recorded
from tests.models.families.random_teacher import make_teacher

WIDTH, INNER = 12, 7
FEW = {"num_records": 6, "num_gradients": 8, "num_latents": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def many(tmp_path_factory, dev_teacher):
    """Enough training prompts that their tokens have variance in every direction."""
    return build_recorded(tmp_path_factory.mktemp("reading") / "cache", dev_teacher, trained=24)


def tokens(count: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return torch.randn(count, 4, WIDTH, generator=generator, dtype=torch.float64) @ mixed + 3


def statistics(embedding_NTD: torch.Tensor, *, batch: int = 100) -> TokenStatistics:
    padding_NT = (torch.arange(len(embedding_NTD))[:, None] + torch.arange(4)) % 4 > 2
    return TokenStatistics.of(zip(embedding_NTD.split(batch), padding_NT.split(batch), strict=True))


def weight() -> torch.Tensor:
    return torch.randn(INNER, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def truncation(found: TokenStatistics, root_ID: torch.Tensor) -> Truncation:
    return Truncation.of(found.mean_D, found.covariance_DD, root_ID)


def context_error(found: Truncation, embedding_NTD: torch.Tensor, rank: int) -> float:
    difference_NTI = (found.apply(embedding_NTD, rank) - embedding_NTD) @ weight().T
    return float(difference_NTI.square().sum(-1).mean())


def test_statistics_are_those_of_all_tokens_whatever_the_batches():
    embedding_NTD = tokens()
    found, rows = statistics(embedding_NTD), embedding_NTD.reshape(-1, WIDTH)
    assert torch.allclose(found.mean_D, rows.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance_DD, torch.cov(rows.T, correction=0), rtol=1e-10, atol=1e-10)
    other = statistics(embedding_NTD, batch=7)
    for name in ("mean_D", "covariance_DD", "padding_mean_TD"):
        # float64 sums in another order.
        assert torch.allclose(getattr(found, name), getattr(other, name), rtol=1e-10, atol=1e-10)
    assert found.padding_variance_fraction == pytest.approx(other.padding_variance_fraction, rel=1e-10)


def test_padding_has_its_share_of_tokens_and_variance_and_a_mean_at_each_position():
    embedding_NTD = torch.zeros(2, 3, 1)
    embedding_NTD[:, :, 0] = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])
    padding_NT = torch.tensor([[False, False, True], [False, True, True]])
    found = TokenStatistics.of([(embedding_NTD, padding_NT)])
    # The mean is 4; squared distances are 9 4 4 and 1 0 16.
    assert (found.padding_tokens, found.padding_fraction) == (3, 0.5)
    assert found.padding_variance_fraction == pytest.approx(20 / 34)
    # Position 0 has no padding: the mean of all padding.
    assert found.padding_mean_TD[:, 0].tolist() == [6.0, 4.0, 7.0]


def test_padding_that_is_replaced_by_itself_changes_nothing_and_other_tokens_stay():
    embedding_BTD = tokens(3).float()
    padding_BT = torch.tensor([[False, False, True, True]] * 3)
    assert torch.equal(replace_padding(embedding_BTD[:1], padding_BT[:1], embedding_BTD[0]), embedding_BTD[:1])
    zeros = replace_padding(embedding_BTD, padding_BT, torch.zeros(4, WIDTH, dtype=torch.float64))
    assert torch.equal(zeros[:, :2], embedding_BTD[:, :2]) and not zeros[:, 2:].any()


def test_no_truncation_has_a_smaller_context_error_than_that_of_the_context_metric():
    embedding_NTD = tokens()
    found = statistics(embedding_NTD)
    context = truncation(found, weight())
    others = [torch.eye(WIDTH).double(), row_space(weight()), metric_root(found.covariance_DD)]
    # The least possible error of rank r: the eigenvalues of W C W^T that are left out (Eckart and Young).
    variance_I = torch.linalg.eigvalsh(weight() @ found.covariance_DD @ weight().T).flip(0)
    for rank in range(1, INNER + 1):
        least = context_error(context, embedding_NTD, rank)
        assert least == pytest.approx(float(variance_I[rank:].sum()), rel=1e-9, abs=1e-9 * float(variance_I.sum()))
        for root_ID in others:
            assert context_error(truncation(found, root_ID), embedding_NTD, rank) >= least - 1e-9
    assert context_error(truncation(found, others[0]), embedding_NTD, 3) > 1.01 * context_error(
        context, embedding_NTD, 3
    )


def test_what_is_removed_with_the_null_space_changes_nothing_of_the_context():
    embedding_NTD = tokens()
    read = truncation(statistics(embedding_NTD), row_space(weight()))
    assert len(row_space(weight())) == len(read.encoder_RD) == INNER
    assert context_error(read, embedding_NTD, INNER) < 1e-18 * float(embedding_NTD.square().mean())
    assert not torch.allclose(read.apply(embedding_NTD, INNER), embedding_NTD)
    null_D = torch.linalg.svd(weight(), full_matrices=True)[2][-1]
    changed = read.apply(embedding_NTD + 5 * null_D, INNER)
    assert torch.allclose(changed, read.apply(embedding_NTD, INNER), rtol=1e-9, atol=1e-9)


def test_all_directions_of_a_metric_that_sees_everything_are_the_embedding_itself():
    embedding_NTD = tokens()
    found = statistics(embedding_NTD)
    for root_ID in (torch.eye(WIDTH).double(), metric_root(found.covariance_DD)):
        assert torch.allclose(truncation(found, root_ID).apply(embedding_NTD, WIDTH), embedding_NTD, rtol=1e-8)


def test_the_spread_is_the_variance_between_rows_per_mean_square():
    assert spread_fraction(torch.tensor([[1.0, 2.0]] * 3)) == 0
    assert spread_fraction(torch.tensor([[1.0], [-1.0]])) == 2
    # Variance 2 around a mean of 10; mean square 101.
    assert spread_fraction(torch.tensor([[9.0], [11.0]])) == pytest.approx(2 / 101)


def test_records_are_different_and_spread_over_trajectories_and_steps():
    found = spread_records(range(10), 4, 20, seed=0)
    assert len(set(found)) == 20 and {i for i, _ in found} == set(range(10))
    assert [sum(k == step for _, k in found) for step in range(4)] == [5, 5, 5, 5]
    assert len(set(spread_records(range(3), 4, 99, seed=0))) == 12
    few = spread_records(range(1000), 4, 100, seed=0)
    # A step does not follow from the place in the cache.
    assert abs(np.corrcoef(np.array(few).T)[0, 1]) < 0.4


def test_ranks_end_with_the_width():
    assert ReadingOptions().ranks_on(256) == (16, 32, 48, 64, 128, 256)
    assert ReadingOptions().ranks_on(4096) == (16, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096)
    assert ReadingOptions().ranks_on(24) == (16, 24)
    assert ranks_of_text("8,2") == (2, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4,x", "--ranks is '4,x', expected numbers such as 16,64,256"),
        ("4,4", "--ranks is '4,4', which has rank 4 twice: give each rank once"),
        ("0,4", "--ranks has 0, expected ranks from 1"),
        ("99", "--ranks has 99, expected ranks up to 24, the width of the cache's embeddings"),
    ],
)
def test_ranks_that_cannot_be_are_refused(text, expected):
    with pytest.raises(SettingsError) as raised:
        ReadingOptions.from_flags(ranks=text).ranks_on(24)
    assert str(raised.value) == expected


def reading(cache, teacher, **flags):
    options = ReadingOptions.from_flags(**FEW | flags)
    folder = find_teacher(str(teacher), REPLAY_PARTS)
    return read_embedding(Cache.open(cache), folder, options, lists=None, device=CPU, progress=Silent())


def test_the_full_rank_reproduces_the_replay_error(many, dev_teacher):
    found = reading(many, dev_teacher, ranks="1,24")
    # The recorded batch size on the recording machine: invariant 3.
    assert found.replay_error == 0
    for metric in METRICS:
        # Rounding of float64 matrices and of a float32 transformer, squared.
        assert found.losses[24][metric] < 1e-9 * found.velocity_mean_square
        assert found.losses[1][metric] > 1e3 * found.losses[24][metric]
    assert found.padding_zero > 0 and 0 < found.padding_fraction < 1


def test_the_measured_metric_does_not_depend_on_the_batches(many, dev_teacher):
    cache, folder = Cache.open(many), find_teacher(str(dev_teacher), REPLAY_PARTS)
    backbone = backbone_of(cache, folder, ReadingOptions().scoring(), CPU, Silent(), gradients=True)
    records = [(index, k) for index in (0, 5, 9) for k in (0, 2)]

    def metric(batch_size: int, seed: int = 0) -> torch.Tensor:
        return measured_metric(cache, backbone, records, seed=seed, batch_size=batch_size, progress=Silent())

    found = metric(4)
    # float32 gradients, each with a relative rounding error of about 1e-6.
    assert torch.allclose(found, metric(1), rtol=0, atol=1e-4 * float(found.trace()))
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12 * float(found.trace())
    assert not torch.allclose(found, metric(4, seed=1), rtol=0, atol=1e-4 * float(found.trace()))


def test_the_measured_metric_is_of_gradients_of_random_projections_of_the_prediction(many, dev_teacher):
    cache, folder = Cache.open(many), find_teacher(str(dev_teacher), REPLAY_PARTS)
    backbone = backbone_of(cache, folder, ReadingOptions().scoring(), CPU, Silent(), gradients=True)
    ((steps, _),) = step_batches(cache, backbone, [(0, 1)], batch_size=1)
    recorded = cached_embeddings(cache, CPU)(steps.prompts)
    jacobian = torch.autograd.functional.jacobian(lambda e: steps.predict(backbone, e).flatten(), recorded)
    # Signs s have E[s s^T] = 1, so the mean over them is that of J^T J.
    signs = random_signs(0, [(0, 1)], steps.velocity_BSC)
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.3
    gradient_TD = torch.einsum("v,vtd->td", signs.flatten(), jacobian[:, 0]).double()
    expected_DD = gradient_TD.T @ gradient_TD / len(gradient_TD)
    found_DD = measured_metric(cache, backbone, [(0, 1)], seed=0, batch_size=1, progress=Silent())
    # float32 gradients, each with a relative rounding error of about 1e-6.
    assert torch.allclose(found_DD, expected_DD, rtol=0, atol=1e-4 * float(expected_DD.trace()))


def words(cache, teacher, *more):
    flags = [part for name, value in FEW.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["inspect", "reading", cache, "--backbone", teacher, "--device", "cpu", *flags, *more]


@pytest.mark.thorough
def test_the_command_prints_the_same_numbers_twice_and_compares_prompts_with_a_text_encoder(many, dev_teacher, capsys):
    found = [secondcast(*words(many, dev_teacher, "--teacher", dev_teacher, "--json"), capsys=capsys) for _ in "12"]
    assert found[0][0] == 0 and found[0][1] == found[1][1]
    facts = json.loads(found[0][1])
    assert [row["rank"] for row in facts["ranks"]] == [16, 24] and (facts["records"], facts["gradients"]) == (6, 8)
    assert list(facts["spread"]) == list(KINDS) and facts["spread"]["visual"]["prompts"] == 24
    assert all(row["prediction_fraction"] > 0 for row in facts["spread"].values())
    code, table, _ = secondcast(*words(many, dev_teacher), capsys=capsys)
    assert code == 0 and "rank" in table
    assert table.splitlines()[-1] == (
        "spread between prompts: not measured; it needs the teacher's text encoder: give the recorded teacher, with "
        "text_encoder_2/, by --teacher"
    )


@pytest.mark.thorough
def test_a_teacher_without_or_with_another_text_encoder_is_named(tmp_path, many, dev_teacher, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(dev_teacher, bare)
    shutil.rmtree(bare / "text_encoder_2")
    code, table, _ = secondcast(*words(many, dev_teacher, "--teacher", bare), capsys=capsys)
    assert code == 0 and table.splitlines()[-1] == (
        f"spread between prompts: not measured; {bare} has no text_encoder_2/: download the whole repository, or give "
        f"another --teacher"
    )
    other = make_teacher(tmp_path / "other", seed=3)
    code, _, heard = secondcast(*words(many, dev_teacher, "--teacher", other), capsys=capsys)
    assert code == 1 and heard.count("\n") == 1
    assert f"{other}/text_encoder_2/model.safetensors has sha256 " in heard
    assert heard.endswith("another model: give the recorded one with --teacher\n")
    code, _, heard = secondcast(*words(many, other), capsys=capsys)
    assert code == 1 and heard.endswith("another model: give the recorded one with --backbone\n")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"store_embeddings": False}, "has no embeddings: it was built with --no-store-embeddings"),
        ({"held_out": 0}, "none of them of the 0 held-out prompts among its 4"),
        ({"trained": 0}, "has 8 committed trajectories, all of held-out prompts"),
    ],
)
def test_a_cache_that_lacks_what_a_reading_needs_is_refused(tmp_path, dev_teacher, flags, expected):
    cache = build_recorded(tmp_path / "cache", dev_teacher, **flags)
    with pytest.raises(NotInCacheError) as raised:
        reading(cache, dev_teacher)
    assert expected in str(raised.value) and str(raised.value).startswith(f"{cache} has ")


@pytest.mark.parametrize("folder", [PROMPTS_FOLDER, POCKET_PROMPTS])
def test_the_lists_have_as_many_prompts_of_each_kind(folder):
    lists = read_prompts(folder)
    assert list(lists) == list(KINDS)
    assert [len(set(texts)) for texts in lists.values()] == [24, 24]


def test_the_pockets_lists_differ_in_what_can_be_seen_or_in_nothing_that_can():
    lists = read_prompts(POCKET_PROMPTS)
    scenes = {kind: {repr(require_scene(text)) for text in texts} for kind, texts in lists.items()}
    assert [len(scenes[kind]) for kind in KINDS] == [24, 1]
