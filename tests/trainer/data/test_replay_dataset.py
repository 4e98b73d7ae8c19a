"""The dataset reads ahead in threads: the same bits in the same order, bounded, and its errors are the cache's own."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import DamagedCacheError, NotInCacheError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import Records
from secondcast.trainer.data import replay_dataset as dataset_module
from secondcast.trainer.data.lru_cache import LRUCache
from secondcast.trainer.data.prefetch import Prefetch, Task
from secondcast.trainer.data.replay_dataset import Batch, BatchSpec, EmbeddingBatch, ReplayDataset, Source
from secondcast.trainer.data.sampler import Part, Sampler, rank_slice
from tests.storage_schemas.caches import STEPS, write_cache

CPU = torch.device("cpu")
COUNT = 10


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / request.param
    write_cache(path, count=COUNT, format=request.param)
    return path


def dataset_of(folder: Path, **settings) -> ReplayDataset:
    cache = Cache.open(folder)
    return ReplayDataset([Source(cache=cache, indices=cache.indices())], device=CPU, **settings)


def requests_of(order: Sampler, first: int, last: int, pretrain_steps: int = 0) -> list[BatchSpec]:
    return [BatchSpec(replays=n >= pretrain_steps, rows=order.batch(n)) for n in range(first, last)]


def an_order(kind: str = "shuffled") -> Sampler:
    return Sampler(kind=kind, parts=(Part(count=COUNT),), steps=STEPS, batch_size=4, seed=3)


def one_by_one(dataset: ReplayDataset, requests: list[BatchSpec]) -> list[Batch | EmbeddingBatch]:
    return [
        dataset.replay_batch(r.rows) if r.replays else dataset.embedding_batch([position for position, _ in r.rows])
        for r in requests
    ]


def same_batches(a: list, b: list) -> bool:
    def same(x, y) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
        if not isinstance(x, torch.Tensor):
            return x == y
        return x.dtype == y.dtype and torch.equal(x, y)

    return len(a) == len(b) and all(
        type(x) is type(y) and all(same(vars(x)[name], vars(y)[name]) for name in vars(x))
        for x, y in zip(a, b, strict=True)
    )


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
@pytest.mark.parametrize("pool_bytes", [1, 2**30])
def test_batches_read_ahead_are_those_read_one_by_one(folder, kind, pool_bytes):
    requests = requests_of(an_order(kind), 0, 20, pretrain_steps=6)
    with dataset_of(folder, pool_bytes=pool_bytes).prefetch(requests) as batches:
        found = list(batches)
    assert same_batches(found, one_by_one(dataset_of(folder), requests))
    assert {type(batch) for batch in found} == {Batch, EmbeddingBatch}


def test_rows_that_share_a_trajectory_read_its_text_once_and_the_teachers_if_asked(folder):
    shared = {"timesteps_per_sample": 2}
    order = Sampler(
        kind="shuffled", parts=(Part(count=COUNT),), steps=STEPS, batch_size=4, seed=3, timesteps_per_sample=2
    )
    requests = [BatchSpec(replays=True, rows=order.batch(n), **shared, embeddings=bool(n % 2)) for n in range(6)]
    dataset = dataset_of(folder)
    with dataset.prefetch(requests) as batches:
        found = list(batches)
    for request, batch in zip(requests, found, strict=True):
        alone = dataset.replay_batch(request.rows)
        assert torch.equal(batch.token_ids_BT, alone.token_ids_BT[::2]) and batch.timesteps_per_sample == 2
        assert torch.equal(batch.hidden_states_BSC, alone.hidden_states_BSC)
        assert batch.step_B.tolist() == [k for _, k in request.rows]
        prompts = [dataset.prompt_of(position) for position, _ in request.rows[::2]]
        if request.embeddings:
            assert torch.equal(batch.encoder_hidden_states_BTD, dataset.teacher_embeddings(prompts))
        else:
            assert batch.encoder_hidden_states_BTD is None


@pytest.mark.parametrize("readers", [1, 2, 7])
def test_any_number_of_readers_gives_the_same_batches(folder, monkeypatch, readers):
    requests = requests_of(an_order(), 0, 12)
    monkeypatch.setattr(dataset_module, "READERS", readers)
    with dataset_of(folder).prefetch(requests) as batches:
        assert same_batches(list(batches), one_by_one(dataset_of(folder), requests))


@pytest.mark.parametrize("first", [0, 1, 7])
def test_reading_from_a_later_step_on_is_the_rest_of_the_whole(folder, first):
    order = an_order()
    whole = one_by_one(dataset_of(folder), requests_of(order, 0, 9))
    with dataset_of(folder).prefetch(requests_of(order, first, 9)) as batches:
        assert same_batches(list(batches), whole[first:])


@given(
    parts=st.integers(1, 4),
    ranks=st.integers(1, 6),
    kind=st.sampled_from(["shuffled", "sequential"]),
    count=st.integers(1, 50),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_parts_of_all_ranks_in_order_are_the_global_batch(parts, ranks, kind, count, step, seed):
    order = Sampler(kind=kind, parts=(Part(count=count),), steps=5, batch_size=parts * ranks, seed=seed)
    batch = order.batch(step)
    of_ranks = [rank_slice(batch, rank=rank, ranks=ranks, rows_per_pass=1) for rank in range(ranks)]
    assert [row for rows in of_ranks for row in rows] == batch
    assert all(len(rows) == parts for rows in of_ranks)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch of 4 rows, expected a multiple of 3 processes x 1 rows per forward"):
        rank_slice(an_order().batch(0), rank=0, ranks=3, rows_per_pass=1)
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1"):
        rank_slice(an_order().batch(0), rank=2, ranks=2, rows_per_pass=1)


def test_damage_is_raised_as_itself_where_its_batch_is_asked_for(tmp_path):
    write_cache(tmp_path / "c", count=COUNT)
    dataset = dataset_of(tmp_path / "c")
    file = next(p for p in (tmp_path / "c/trajectories.zarr/velocity").glob("c/1/**/*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    requests = [BatchSpec(replays=True, rows=[(position, 0)]) for position in (0, 1, 2, 5, 3)]
    with dataset.prefetch(requests) as batches:
        for _ in range(3):
            next(batches)
        with pytest.raises(DamagedCacheError, match=r"has checksum \w+, expected \w+: trajectories shard 1 is damaged"):
            next(batches)
    assert prefetch_threads() == []


def test_what_is_not_in_the_cache_is_said_as_without_threads(folder):
    whole = Cache.open(folder)
    records = Records([record for key, record in whole.records.items() if key != ("trajectories", 2)], "here")
    cache = Cache(whole.folder, whole.manifest, records, finished=False, verify="once")
    dataset = ReplayDataset([Source(cache=cache, indices=whole.indices())], device=CPU)
    requests = [BatchSpec(replays=True, rows=[(9, 0), (8, 0)])] * 6
    with dataset.prefetch(requests) as batches, pytest.raises(NotInCacheError, match="trajectory 9 is not in .* yet"):
        next(batches)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_when_training_stops(folder, error):
    order = an_order()
    requests = (BatchSpec(replays=True, rows=order.batch(n)) for n in range(10**6))
    with pytest.raises(error), dataset_of(folder).prefetch(requests) as batches:
        next(batches)
        assert prefetch_threads()
        raise error
    assert prefetch_threads() == []


def test_the_consumer_never_waits_when_reading_is_faster():
    tasks = [Task(run=lambda: time.sleep(0.002), size_bytes=1) for _ in range(20)]
    waited = []
    with Prefetch(tasks, readers=2, ahead=4, ahead_bytes=100) as values:
        next(values)
        time.sleep(0.05)
        for _ in range(19):
            started = time.monotonic()
            next(values)
            waited.append(time.monotonic() - started)
            time.sleep(0.01)
    assert sorted(waited)[9] < 0.005


@given(
    sizes=st.lists(st.integers(1, 50), max_size=30),
    readers=st.integers(1, 5),
    ahead=st.integers(1, 6),
    ahead_bytes=st.integers(1, 100),
)
def test_no_more_is_begun_than_allowed_and_the_order_is_kept(sizes, readers, ahead, ahead_bytes):
    begun: list[int] = []
    tasks = [Task(run=lambda n=n: (begun.append(n), n)[1], size_bytes=size) for n, size in enumerate(sizes)]
    with Prefetch(tasks, readers=readers, ahead=ahead, ahead_bytes=ahead_bytes) as values:
        for n, value in enumerate(values):
            assert value == n
            held = [m for m in list(begun) if m > n]
            assert len(held) <= ahead
            assert len(held) <= 1 or sum(sizes[m] for m in held) <= ahead_bytes
    assert sorted(begun) == list(range(len(sizes)))


def test_the_pool_stays_within_its_bytes_and_forgets_the_oldest():
    pool: LRUCache[int] = LRUCache(10)
    read: list[int] = []

    def reading(key: int) -> tuple[int, int]:
        read.append(key)
        return key, 4

    for key in (1, 2, 1, 3, 1, 2):
        assert pool.get(key, reading) == key
        assert pool.held_bytes <= 10
    assert read == [1, 2, 3, 2]
    assert LRUCache(1).get(7, reading) == 7


def test_threads_that_want_the_same_value_read_it_once_and_share_its_error():
    pool: LRUCache[int] = LRUCache(100)
    calls, outcomes = [], []
    go = threading.Barrier(6)

    def reading(key: int) -> tuple[int, int]:
        calls.append(key)
        time.sleep(0.02)
        if key == 2:
            raise DamagedCacheError("shard 2 is damaged")
        return key, 1

    def want() -> None:
        go.wait()
        outcomes.append(pool.get(1, reading))
        go.wait()
        try:
            pool.get(2, reading)
        except DamagedCacheError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.count(1) == 1 and sorted(map(str, outcomes)) == ["1"] * 6 + ["shard 2 is damaged"] * 6
    with pytest.raises(DamagedCacheError):
        pool.get(2, reading)


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("cuda", 7)])
def test_memory_is_pinned_for_a_gpu_alone(folder, monkeypatch, device, expected):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(1), tensor)[1])
    cache = Cache.open(folder)
    dataset = ReplayDataset([Source(cache=cache, indices=cache.indices())], device=torch.device(device))
    monkeypatch.setattr(dataset, "_on_device", lambda batch: batch)
    with dataset.prefetch([BatchSpec(replays=True, rows=[(0, 1)])]) as batches:
        next(batches)
    assert len(pinned) == expected
