"""A pool of workers makes every shard once, tries again what fails, and is not used up by one that always fails."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from secondcast.cache_builder.workers.shard_queue import ShardQueue


def work_through(queue: ShardQueue, workers: int, fails) -> Counter:
    """Workers take turns; fails(worker, run) says whether a task does. What was made, by shard."""
    made: Counter[int] = Counter()
    while True:
        taken = [(worker, run) for worker in range(workers) if (run := queue.take(worker)) is not None]
        if not taken:
            return made
        for worker, run in taken:
            if fails(worker, run):
                queue.failed(worker, run, ValueError(f"worker {worker}, shards {run}"))
            else:
                queue.made(worker)
                made.update(run)


@given(st.sets(st.integers(0, 500), max_size=60), st.integers(1, 9))
def test_every_shard_is_made_once_in_runs_of_at_most_two(numbers, workers):
    queue = ShardQueue(sorted(numbers), workers)
    lengths = []
    made = work_through(queue, workers, lambda worker, run: lengths.append(len(run)))
    assert made == Counter(numbers) and set(lengths) <= {1, 2}
    assert queue.unmade == queue.given_up == []


@given(st.integers(1, 40), st.integers(2, 6), st.data())
def test_a_worker_that_always_fails_costs_no_shard(count, workers, data):
    broken = data.draw(st.integers(0, workers - 1))
    queue = ShardQueue(range(count), workers)
    tried: Counter[int] = Counter()

    def fails(worker, run):
        tried[worker] += 1
        return worker == broken and not (queue.given_up or tried[broken] > 2)

    made = work_through(queue, workers, fails)
    assert tried[broken] <= 2
    # Where both tries of a run fell to it, that run alone is given up.
    assert set(made) | set(queue.unmade) == set(range(count)) and len(queue.unmade) <= 2


@given(st.integers(1, 40), st.integers(1, 6), st.data())
def test_a_shard_that_always_fails_is_given_up_after_two_tries_and_every_other_is_made(count, workers, data):
    bad = data.draw(st.integers(0, count - 1))
    queue = ShardQueue(range(count), workers)
    tried: Counter[int] = Counter()

    def fails(worker, run):
        tried.update(run)
        return bad in run

    work_through(queue, workers, fails)
    assert tried[bad] == 2 and bad in queue.unmade and len(queue.unmade) <= 2
    (given_up,) = queue.given_up
    assert bad in given_up.run and str(given_up.error).endswith(f"shards {given_up.run}")


def test_what_nobody_is_left_for_is_unmade_and_the_last_error_is_kept():
    queue = ShardQueue(range(12), 1)
    made = work_through(queue, 1, lambda worker, run: True)
    assert not made and queue.unmade == list(range(12)) and queue.is_retired(0)
    assert str(queue.last_error) == "worker 0, shards (2, 3)" and queue.given_up == []
    queue = ShardQueue(range(3), 2)
    queue.retire(1, OSError("no image"))
    assert queue.take(1) is None and queue.take(0) == (0,) and str(queue.last_error) == "no image"
