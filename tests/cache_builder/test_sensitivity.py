"""What was measured on a cache does not depend on who measured it, in how many goes; it is guarded as shards are."""

import shutil

import numpy as np
import pytest
import torch

from cache_builder import sensitivity as measuring
from cache_builder.sensitivity import measure
from cache_builder.sensitivity_plan import SensitivitySettings
from cache_builder.weight_predictor import FEWEST_PROMPTS
from cache_builder.workers import Worker
from inspection.summary import summarise
from inspection.summary_text import summary_lines
from models.teacher_folder import REPLAY_PARTS, find_teacher
from storage_schemas import sensitivity
from storage_schemas.errors import BadSettings, DamagedCache, NonFinite, SettingsDiffer
from storage_schemas.folders import LocalFolder
from storage_schemas.progress import Silent
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import ARRAYS_FILE, RECORD_FILE, predicted_weights
from storage_schemas.verification import verify
from tests.cache_builder.building import build_cache

CPU = torch.device("cpu")
COUNT = 26


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("measured")
    words = [(c, t, s) for c in ("red", "green", "blue") for t in ("dog", "cat", "car") for s in ("left", "right", "")]
    (folder / "p.txt").write_text("".join(f"a {c} {t} on the {s}\n" for c, t, s in words))
    build_cache(folder / "cache", dev_teacher, folder / "p.txt", shard_size=9, batch_size=9, dtype="float32")
    return folder / "cache"


@pytest.fixture
def cache_folder(tmp_path, recorded):
    return shutil.copytree(recorded, tmp_path / "cache")


def run(folder, teacher, *, worker=None, anew=False, **flags):
    settings = SensitivitySettings.from_flags(**{"products": 2, "part_size": 8, "batch_size": 5, **flags})
    return measure(
        Cache.open(folder), find_teacher(str(teacher), REPLAY_PARTS), settings,
        device=CPU, progress=Silent(), worker=worker or Worker(), anew=anew,
    )  # fmt: skip


def arrays(folder):
    return (folder / ARRAYS_FILE).read_bytes()


def test_two_workers_measure_what_one_does_bit_for_bit(tmp_path, cache_folder, recorded, dev_teacher):
    other = shutil.copytree(recorded, tmp_path / "other")
    assert run(cache_folder, dev_teacher) is not None
    assert run(other, dev_teacher, worker=Worker(number=1, count=2)) is None
    assert run(other, dev_teacher, worker=Worker(number=0, count=2)) is not None
    assert arrays(cache_folder) == arrays(other)
    assert not list((other / "sensitivity/parts").iterdir())


def test_what_was_measured_before_a_kill_is_not_measured_again(cache_folder, dev_teacher, monkeypatch):
    write, made = sensitivity.write_part, []

    def killed(*given):
        if made:
            raise KeyboardInterrupt
        made.append(given[2])
        write(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sensitivity, "write_part", killed)
        run(cache_folder, dev_teacher)
    assert [part.name for part in (cache_folder / "sensitivity/parts").iterdir()] == ["000000.safetensors"]
    assert sensitivity.unfinished(LocalFolder(cache_folder)) == (1, 4)
    line = dict(summary_lines(summarise(Cache.open(cache_folder))))["sensitivity"]
    assert line == "not finished, 1 of 4 parts: the same `understudy sensitivity` goes on"
    assert verify(cache_folder, Silent()).problems == ()
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "write_part", lambda *given: (made.append(given[2]), write(*given)))
        assert run(cache_folder, dev_teacher) is not None
    assert len(made) > 2 and made == list(range(len(made)))
    assert sensitivity.unfinished(LocalFolder(cache_folder)) is None


def test_a_record_that_was_lost_is_told_by_verify(cache_folder, dev_teacher):
    run(cache_folder, dev_teacher, prompts=8)
    (cache_folder / RECORD_FILE).unlink()
    (problem,) = verify(cache_folder, Silent()).problems
    assert problem.message == f"{cache_folder}/{RECORD_FILE} is missing though what was measured is there"
    run(cache_folder, dev_teacher, prompts=8)
    assert verify(cache_folder, Silent()).problems == ()


def test_the_metric_is_the_mean_over_products_prompts_and_tokens(cache_folder, dev_teacher):
    whole = run(cache_folder, dev_teacher)
    count, _ = whole.weights_NT.shape
    assert count == len(whole.record.plan.prompt_ids) >= FEWEST_PROMPTS
    assert whole.weights_NT.mean() == pytest.approx(1, rel=1e-5)
    # The trace of s s^T of a token is what its weight is made of.
    parts = [run_part(cache_folder, dev_teacher, whole, at) for at in (0, 3)]
    for at, products_PTD in zip((0, 3), parts, strict=True):
        squares_T = products_PTD.square().mean((0, 2)).numpy()
        scale = float(np.trace(whole.metric_DD)) / len(whole.metric_DD)
        assert whole.weights_NT[at] == pytest.approx(squares_T / scale, rel=1e-3)
    assert np.array_equal(whole.metric_DD, whole.metric_DD.T)
    metric_DD = whole.metric_DD.astype(np.float64)
    rank = np.trace(metric_DD) ** 2 / np.square(metric_DD).sum()
    assert 1 < whole.record.effective_rank == pytest.approx(rank, rel=1e-4)
    largest = np.linalg.eigvalsh(metric_DD)[-1] / np.trace(metric_DD)
    assert whole.record.spectrum[0] == pytest.approx(largest, rel=1e-4) and len(whole.record.spectrum) <= 32


def run_part(folder, teacher, whole, at):
    """The products of one prompt by themselves."""
    cache, plan = Cache.open(folder), whole.record.plan
    settings = SensitivitySettings(products=2)
    backbone = measuring._backbone(cache.manifest, find_teacher(str(teacher), REPLAY_PARTS), settings, CPU)
    work = measuring._Measurement(cache, backbone, plan, 3, measuring.first_trajectories(cache))
    with Silent().bar("", total=1, done=0, unit="") as bar:
        return work._products([cache.trajectory(work.firsts[plan.prompt_ids[at]])], bar)[0]


def test_weights_of_other_prompts_are_predicted_from_their_embeddings(cache_folder, dev_teacher):
    whole = run(cache_folder, dev_teacher)
    assert whole.predictor_D1 is not None and -1 <= whole.record.predicted_correlation <= 1
    cache = Cache.open(cache_folder)
    numbers = {prompt.id: number for number, prompt in enumerate(cache.prompts)}
    told = [
        predicted_weights(whole.predictor_D1, cache.embedding(numbers[one])) for one in whole.record.plan.prompt_ids
    ]
    assert np.mean(told) == pytest.approx(1, rel=1e-4)
    # Better than saying 1 of every token.
    off = np.log(np.stack(told)) - np.log(whole.weights_NT)
    assert np.square(off).mean() < np.square(np.log(whole.weights_NT)).mean()
    few = run(cache_folder, dev_teacher, anew=True, prompts=FEWEST_PROMPTS - 1)
    assert few.predictor_D1 is None and few.record.predicted_correlation is None


def test_other_flags_are_refused_and_anew_begins_again(cache_folder, dev_teacher):
    run(cache_folder, dev_teacher, prompts=8)
    assert run(cache_folder, dev_teacher, prompts=8, part_size=3) is not None
    with pytest.raises(SettingsDiffer) as refused:
        run(cache_folder, dev_teacher, prompts=8, products=3)
    assert str(refused.value) == (
        f"{cache_folder}/sensitivity was begun with products 2, this is 3: sums of both would mean neither; give the "
        f"flags of the first time, or --anew, which deletes what was measured"
    )
    found = run(cache_folder, dev_teacher, prompts=8, products=3, anew=True)
    assert found.record.plan.products == 3 and len(found.weights_NT) == 8


def test_one_of_several_workers_does_not_delete_what_the_others_measured(cache_folder, dev_teacher):
    run(cache_folder, dev_teacher, worker=Worker(number=1, count=2))
    with pytest.raises(BadSettings) as refused:
        run(cache_folder, dev_teacher, worker=Worker(number=0, count=2), anew=True)
    assert str(refused.value) == (
        "--anew is given to worker 0/2: it would delete what the others measure meanwhile; give it once without "
        "--worker, interrupt that, and start the workers without --anew"
    )
    assert list((cache_folder / "sensitivity/parts").iterdir())


@pytest.mark.parametrize("path", [ARRAYS_FILE, RECORD_FILE])
def test_a_flipped_byte_is_told_by_reading_and_by_verify(cache_folder, dev_teacher, path):
    run(cache_folder, dev_teacher, prompts=8)
    assert verify(cache_folder, Silent()).problems == ()
    data = bytearray((cache_folder / path).read_bytes())
    data[len(data) // 2] ^= 0x40
    (cache_folder / path).write_bytes(bytes(data))
    with pytest.raises(DamagedCache) as told:
        sensitivity.read(Cache.open(cache_folder).folder)
    assert str(told.value).startswith(f"{cache_folder}/{path} is not as it was written")
    assert "--anew" in str(told.value)
    (problem,) = verify(cache_folder, Silent()).problems
    assert problem.message == str(told.value)


def test_a_changed_part_is_told(cache_folder, dev_teacher):
    run(cache_folder, dev_teacher, worker=Worker(number=1, count=2))
    part = next(iter((cache_folder / "sensitivity/parts").iterdir()))
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(DamagedCache) as told:
        run(cache_folder, dev_teacher)
    assert str(told.value) == (
        f"{part} is not as it was written: delete it, and give the same command again, which makes it anew"
    )


def test_a_product_that_is_no_number_stops_the_measurement(cache_folder, dev_teacher, monkeypatch):
    monkeypatch.setattr(measuring, "text_products", lambda predict, e, normals: [torch.full_like(e, torch.nan)] * 2)
    with pytest.raises(NonFinite, match=r"a product of trajectory [0-9a-f]+-0000 is not finite"):
        run(cache_folder, dev_teacher, prompts=8)
    assert sensitivity.read(Cache.open(cache_folder).folder) is None


def test_a_transformer_that_reads_nothing_is_told_and_leaves_no_record(cache_folder, dev_teacher, monkeypatch):
    monkeypatch.setattr(measuring, "text_products", lambda predict, e, normals: [torch.zeros_like(e)] * 2)
    with pytest.raises(NonFinite, match=r"all 192 products of tokens of .*cache are 0: this transformer does not read"):
        run(cache_folder, dev_teacher, prompts=8)
    assert sensitivity.read(Cache.open(cache_folder).folder) is None


def test_more_steps_than_there_are_is_refused(cache_folder, dev_teacher):
    with pytest.raises(BadSettings) as refused:
        run(cache_folder, dev_teacher, steps=5)
    assert str(refused.value) == f"--steps is 5, the trajectories of {cache_folder} have 4: give at most 4"


def test_a_cache_without_embeddings_cannot_be_measured(tmp_path, dev_teacher, prompt_file):
    build_cache(tmp_path / "cache", dev_teacher, prompt_file, embeddings="none")
    with pytest.raises(BadSettings) as refused:
        run(tmp_path / "cache", dev_teacher)
    assert str(refused.value) == (
        f"{tmp_path}/cache was built with --embeddings none: sensitivity is the derivative at the teacher's "
        f"embeddings; build with --embeddings stored"
    )


def test_wrong_flags_with_anew_delete_nothing(cache_folder, dev_teacher):
    whole = run(cache_folder, dev_teacher, prompts=8)
    for wrong in ({"steps": 5}, {"attention_backend": "nonsense"}):
        with pytest.raises(BadSettings):
            run(cache_folder, dev_teacher, prompts=8, anew=True, **wrong)
    assert sensitivity.read(Cache.open(cache_folder).folder).record == whole.record


def test_anew_that_is_killed_leaves_no_part_without_its_plan(cache_folder, dev_teacher, monkeypatch):
    run(cache_folder, dev_teacher, worker=Worker(number=1, count=2))
    folder = Cache.open(cache_folder).folder
    remove, removed = folder.remove, []

    def killed(path):
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder, "remove", killed)
        sensitivity.forget(folder)
    assert run(cache_folder, dev_teacher) is not None
    sensitivity.forget(folder)
    assert not folder.names("sensitivity")


@pytest.mark.parametrize("finished", [False, True])
def test_a_measurement_goes_on_with_its_prompts_when_its_cache_has_grown(tmp_path, cache_folder, dev_teacher, finished):
    commits = cache_folder / "commits"
    later = [*commits.glob("*-000001.json"), *commits.glob("index*")]
    assert len(later) == 3
    for file in later:
        shutil.move(file, tmp_path / file.name)
    worker = None if finished else Worker(number=1, count=2)
    begun = run(cache_folder, dev_teacher, prompts=12, part_size=4, worker=worker)
    plan = sensitivity.read_plan(Cache.open(cache_folder).folder)
    for file in later:
        shutil.move(tmp_path / file.name, file)
    settings = SensitivitySettings.from_flags(products=2, prompts=12, part_size=4)
    assert settings.plan(Cache.open(cache_folder)).prompt_ids != plan.prompt_ids
    whole = run(cache_folder, dev_teacher, prompts=12, part_size=4)
    assert whole.record.plan == plan and (not finished or begun.record == whole.record)
    with pytest.raises(SettingsDiffer, match="was begun with prompts 12, this is 13: "):
        run(cache_folder, dev_teacher, prompts=13, part_size=4)


def test_a_worker_that_comes_last_gives_what_another_put_together(cache_folder, dev_teacher, monkeypatch):
    finish, given = measuring._finish, []

    def both(*words):
        # The other worker is through between this one's last part and its sums.
        given.append(finish(*words))
        return finish(*words)

    monkeypatch.setattr(measuring, "_finish", both)
    found = run(cache_folder, dev_teacher, prompts=8)
    assert found is not None and found.record == given[0].record


def test_parts_that_a_kill_left_behind_the_record_are_deleted(cache_folder, dev_teacher, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "forget_parts", lambda folder: None)
        run(cache_folder, dev_teacher, prompts=8)
    assert list((cache_folder / "sensitivity/parts").iterdir())
    run(cache_folder, dev_teacher, prompts=8)
    assert not list((cache_folder / "sensitivity/parts").iterdir())
