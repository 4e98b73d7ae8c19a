"""Which shards a worker makes is a function of their numbers, however the workers were started."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.cache_builder.worker import Launched, Worker, launched_worker
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.layout import Shards


@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 7))
def test_every_shard_has_exactly_one_worker(count, items, size):
    shards = Shards([(items, size)])
    owned = [Worker(number=number, count=count).owned(shards) for number in range(count)]
    assert sorted(shard.shard for part in owned for shard in part) == list(range(len(shards)))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("text", ["", "3", "4/4", "-1/4", "a/b", "1/0", "1/2/3"])
def test_a_worker_that_cannot_be_is_refused(text):
    with pytest.raises(SettingsError, match=f"--worker is {text!r}, expected i/n with i from 0 to n - 1"):
        Worker.parse(text)


@pytest.mark.parametrize(
    ("launcher", "environment", "local"),
    [
        ("torchrun", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 1),
        ("Slurm", {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}, 1),
    ],
)
def test_the_launchers_variables_say_which_worker_this_is(launcher, environment, local):
    expected = Launched(worker=Worker(number=5, count=8), by=launcher, local_number=local)
    assert launched_worker(None, environment) == expected
    assert launched_worker("0/2", environment).worker == Worker(number=0, count=2)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3"}],
    ids=["no launcher", "a Slurm batch script without srun", "one process", "half of the variables"],
)
def test_a_single_process_makes_every_shard(environment):
    assert launched_worker(None, environment) == Launched(worker=Worker(), by="", local_number=None)


def test_variables_that_make_no_sense_are_named():
    with pytest.raises(SettingsError, match="RANK is '9' and WORLD_SIZE is '8' in the environment"):
        launched_worker(None, {"RANK": "9", "WORLD_SIZE": "8"})
