"""Repeats of a source are samples: several segments of other sizes in one cache, M asked for are M there."""

import pytest
import torch

from secondcast.cache_builder.build import build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.inspection.summary import summarise
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from tests.cache_builder.building import data_files
from tests.cache_builder.test_build import StopAfter

CPU = torch.device("cpu")
WORDS = {"animals": ["a dog", "a cat", "a cow"], "colours": ["a red car", "a dog"], "signs": ["a sign"]}


class Heard(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def record(tmp_path_factory, dev_teacher):
    folder = tmp_path_factory.mktemp("repeats")
    for name, lines in WORDS.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    sources = (f"{folder}/animals.txt", f"{folder}/colours.txt:repeat=3", f"{folder}/signs.txt:repeat=2")

    def run(name, progress=None, **flags):
        settings = BuildSettings.from_flags(
            prompts=sources, samples_per_prompt=2, steps=4, shard_size=3, batch_size=2, **flags
        )
        teacher = find_teacher(str(dev_teacher), BUILD_PARTS)
        return build(str(folder / name), settings, teacher, CPU, progress or Silent())

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole(record):
    heard = Heard()
    result = record("whole", heard)
    return Cache.open(record.folder / "whole"), result, heard.messages


def test_the_announced_number_of_trajectories_is_in_the_cache(whole):
    cache, result, messages = whole
    assert messages[0] == "5 distinct prompts, 20 trajectories (0 empty and 1 repeated lines skipped)"
    assert result.trajectories == len(cache) == cache.planned == 20 and cache.finished
    samples_per_prompt: dict[str, set[int]] = {}
    for i in range(len(cache)):
        trajectory = cache.trajectory(int(cache.indices()[i]))
        samples_per_prompt.setdefault(cache.prompts[trajectory.prompt].text, set()).add(trajectory.sample_index)
    assert samples_per_prompt == {
        "a dog": set(range(6)), "a red car": set(range(6)), "a sign": set(range(4)),
        "a cat": {0, 1}, "a cow": {0, 1},
    }  # fmt: skip


def test_there_is_a_segment_for_each_number_of_samples(whole):
    segments = whole[0].manifest.prompts.segments
    assert [(g.first_prompt, g.prompts, g.first_sample, g.samples_per_prompt) for g in segments] == [
        (0, 2, 0, 6),
        (2, 1, 0, 4),
        (3, 2, 0, 2),
    ]
    summary = summarise(whole[0])
    assert summary["trajectories"] == {"committed": 20, "planned": 20} and summary["state"] == "finished"
    assert summary["prompts"]["sources"] == {"animals": 3, "colours": 2, "signs": 1}


@pytest.mark.thorough
@pytest.mark.parametrize("batches", [3, 8])
def test_interrupted_in_any_segment_and_resumed_it_is_byte_identical(record, whole, batches):
    with pytest.raises(KeyboardInterrupt):
        record(f"cut-{batches}", StopAfter(batches))
    assert not Cache.open(record.folder / f"cut-{batches}").finished
    record(f"cut-{batches}")
    assert data_files(record.folder / f"cut-{batches}") == data_files(record.folder / "whole")


@pytest.mark.thorough
def test_a_trajectory_is_the_one_that_a_build_without_repeats_records(record, whole, dev_teacher):
    settings = BuildSettings.from_flags(
        prompts=(record.folder / "signs.txt",), steps=4, shard_size=1, batch_size=2, samples_per_prompt=2
    )
    build(str(record.folder / "plain"), settings, find_teacher(str(dev_teacher), BUILD_PARTS),
          CPU, Silent())  # fmt: skip
    plain, cache = Cache.open(record.folder / "plain"), whole[0]
    ours = {cache.trajectory(int(i)).key: cache.trajectory(int(i)) for i in cache.indices()}
    for i in plain.indices():
        trajectory = plain.trajectory(int(i))
        assert same_bits(trajectory.noise_SC, ours[trajectory.key].noise_SC)
        assert trajectory.guidance == ours[trajectory.key].guidance


@pytest.mark.thorough
def test_it_verifies_and_converts_there_and_back_to_the_same_bytes(record, whole):
    folder = record.folder
    assert not verify(str(folder / "whole"), Silent()).problems
    convert(whole[0], str(folder / "tars"), Silent(), format="webdataset")
    convert(Cache.open(folder / "tars"), str(folder / "back"), Silent(), format="zarr")
    assert data_files(folder / "back") == data_files(folder / "whole")


def test_equal_repeats_are_told_as_before_and_are_one_segment(record, dev_teacher):
    heard = Heard()
    settings = BuildSettings.from_flags(prompts=(f"{record.folder}/animals.txt:repeat=2:limit=2",), steps=1)
    build(str(record.folder / "equal"), settings, find_teacher(str(dev_teacher), BUILD_PARTS),
          CPU, heard)  # fmt: skip
    assert heard.messages[0].startswith(
        "2 distinct prompts x 2 samples = 4 trajectories (0 empty and 0 repeated lines skipped; stopped reading at"
    )
    assert len(Cache.open(record.folder / "equal").manifest.prompts.segments) == 1


def test_prompts_that_are_cut_are_counted_and_the_longest_shown_with_its_tokens(tmp_path, dev_teacher):
    file = tmp_path / "long.txt"
    file.write_text(f"a dog\n{'a red car ' * 6}\n{'a red car ' * 40}\n")
    heard = Heard()
    settings = BuildSettings.from_flags(prompts=(file,), steps=1)
    build(str(tmp_path / "c"), settings, find_teacher(str(dev_teacher), BUILD_PARTS), CPU, heard)
    shown = ("a red car " * 40)[:80]
    tokens = heard.messages[1].split(" tokens: ")[0].rsplit(" ", 1)[1]
    assert heard.messages[1] == (
        f"2 prompts are longer than 12 tokens and truncated, the longest has {tokens} tokens: {shown + '...'!r}"
    )
    assert int(tokens) > 100
