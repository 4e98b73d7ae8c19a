"""A run keeps the trajectories with which it began: a cache that grows meanwhile does not change its order."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import RunError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.training_set import TrainingSet, _ranges
from tests.cache_builder.building import build_cache
from tests.cache_builder.test_codec_flags import StopIn
from tests.trainer.test_train import Listening, StopAfter, run_training, same_weights

FLAGS = {"dtype": "float32", "steps": 2, "shard_size": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, dev_teacher):
    """Caches of one set of flags: `first` of six prompts, `cut` while it was built, `more` extended, `others`."""
    folder = tmp_path_factory.mktemp("grown")
    lines = [f"a red dog {i}\n" for i in range(9)]
    for name, part in {"six": lines[:6], "all": lines, "others": lines[3:]}.items():
        (folder / f"{name}.txt").write_text("".join(part))
    build_cache(folder / "first", dev_teacher, folder / "six.txt", **FLAGS)
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder / "cut", dev_teacher, folder / "six.txt", progress=StopIn("sample", 3), **FLAGS)
    shutil.copytree(folder / "first", folder / "more")
    build_cache(folder / "more", dev_teacher, folder / "all.txt", extend=True, samples_per_prompt=2, **FLAGS)
    build_cache(folder / "others", dev_teacher, folder / "others.txt", **FLAGS)
    return folder


def cut_and_resumed(tmp_path, before, after, teacher, student, **flags):
    """A run that was killed after its first checkpoint and goes on with another state of the cache; what it says."""
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", before, teacher, student, progress=StopAfter(3), **flags)
    listening = Listening()
    run_training(tmp_path / "cut", after, teacher, student, progress=listening, **flags)
    return listening.heard


@pytest.mark.slow
@pytest.mark.parametrize("before", ["first", "cut"])
def test_resumed_after_the_cache_grew_the_weights_are_those_of_an_unbroken_run(
    tmp_path, grown, dev_teacher, t5_config, before
):
    run_training(tmp_path / "whole", grown / before, dev_teacher, t5_config)
    heard = cut_and_resumed(tmp_path, grown / before, grown / "more", dev_teacher, t5_config)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    began, now = len(Cache.open(grown / before)), len(Cache.open(grown / "more"))
    assert (
        f"{tmp_path / 'cut'} keeps training on the {began} trajectories it started with, of {now} that "
        f"{grown / 'more'} has now: a new run folder uses all of them"
    ) in heard
    # What it would have been without: another order.
    run_training(tmp_path / "new", grown / "more", dev_teacher, t5_config)
    assert not same_weights(tmp_path / "new", tmp_path / "whole")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("first", "others", r"was started on 6 prompts of digest \w+, those of .*/others have \w+: the data order"),
        (
            "more",
            "first",
            r"was started on a cache with segments\[1\] = \{.*\}, .*/first has null: the data order ",
        ),
        ("first", "cut", r"was started on 6 trajectories, of which .*/cut lacks those of shard \d: the data order"),
    ],
)
def test_a_cache_that_does_not_hold_them_is_refused_in_one_line(
    tmp_path, grown, dev_teacher, t5_config, before, after, said
):
    with pytest.raises(RunError, match=said) as caught:
        cut_and_resumed(tmp_path, grown / before, grown / after, dev_teacher, t5_config)
    assert str(caught.value).endswith("; give the original cache, or a new run folder")
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_a_run_without_a_checkpoint_begins_with_what_is_there_now(tmp_path, grown, dev_teacher, t5_config):
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", grown / "first", dev_teacher, t5_config, progress=StopAfter(1))
    run_training(tmp_path / "run", grown / "more", dev_teacher, t5_config)
    run_training(tmp_path / "whole", grown / "more", dev_teacher, t5_config)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_indices_are_those_of_the_cache_as_it_was(grown):
    for name in ("first", "cut", "more"):
        cache = Cache.open(grown / name)
        assert np.array_equal(TrainingSet.of(cache).indices(), cache.indices()) and len(cache) > 0


@given(st.sets(st.integers(0, 40)))
def test_ranges_hold_each_number_once_and_do_not_touch(numbers):
    ranges = list(_ranges(sorted(numbers)))
    assert [n for first, end in ranges for n in range(first, end)] == sorted(numbers)
    assert all(end < first for (_, end), (first, _) in pairwise(ranges))
