"""Text caches: prompts and embeddings without trajectories, in everything that a cache can do."""

import re
import shutil
from pathlib import Path

import pytest

from secondcast.cache_builder.repair.rebuild import rebuild
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.teacher.folder import BUILD_PARTS, find_teacher
from secondcast.storage_schemas.errors import (
    NoTrajectoriesError,
    SettingsError,
    SettingsMismatchError,
)
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.maintenance.merge import merge
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.subset import subset
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from tests.cache_builder.building import CPU, build_cache, data_files
from tests.trainer.test_train import StopAfter

FORMATS = ("zarr", "webdataset")


def text_build(path, teacher: Path, prompts: Path, **flags):
    # The options of trajectories have to stay at their defaults.
    return build_cache(path, teacher, prompts, steps=20, text_only=True, **flags)


@pytest.fixture
def more_prompts(tmp_path: Path) -> Path:
    file = tmp_path / "more.txt"
    file.write_text("a red dog on the left\na blue fish\na green bird\n")
    return file


@pytest.mark.parametrize("format", FORMATS)
def test_it_holds_the_embeddings_of_a_cache_with_trajectories_bit_for_bit(tmp_path, dev_teacher, prompt_file, format):
    result = text_build(tmp_path / "text", dev_teacher, prompt_file, format=format)
    build_cache(tmp_path / "full", dev_teacher, prompt_file)
    text, full = Cache.open(tmp_path / "text"), Cache.open(tmp_path / "full")
    assert (result.finished, result.embeddings, result.planned, len(text)) == (True, 6, 0, 0)
    assert all(same_bits(text.embedding(number), full.embedding(number)) for number in range(6))
    assert [prompt.held_out for prompt in text.prompts] == [prompt.held_out for prompt in full.prompts]
    digests = text.manifest.digests()
    assert set(digests) == {"teacher", "prompts"} and digests["teacher"] == full.manifest.digests()["teacher"]
    assert verify(tmp_path / "text", Silent()).problems == ()


def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path, dev_teacher, prompt_file):
    text_build(tmp_path / "whole", dev_teacher, prompt_file)
    with pytest.raises(KeyboardInterrupt):
        text_build(tmp_path / "part", dev_teacher, prompt_file, progress=StopAfter(1))
    text_build(tmp_path / "part", dev_teacher, prompt_file)
    assert data_files(tmp_path / "part") == data_files(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_extended_merged_and_cut_down(tmp_path, dev_teacher, prompt_file, more_prompts, format):
    text_build(tmp_path / "a", dev_teacher, prompt_file, format=format)
    text_build(tmp_path / "b", dev_teacher, more_prompts, format=format)
    text_build(tmp_path / "extended", dev_teacher, prompt_file, format=format)
    extended = text_build(tmp_path / "extended", dev_teacher, more_prompts, format=format, extend=True)
    assert (extended.finished, extended.embeddings) == (True, 8)
    merged = merge([Cache.open(tmp_path / name) for name in "ab"], tmp_path / "merged", Silent())
    assert (merged.prompts, merged.planned, merged.embeddings_missing) == (8, 0, 0)
    whole, other = Cache.open(tmp_path / "extended"), Cache.open(tmp_path / "merged")
    assert all(same_bits(whole.embedding(number), other.embedding(number)) for number in range(8))
    subset(whole, tmp_path / "two", Silent(), count=2)
    assert len(Cache.open(tmp_path / "two").prompts) == 2
    for name in ("extended", "merged", "two"):
        assert verify(tmp_path / name, Silent()).problems == ()


@pytest.mark.parametrize(("one", "other"), [FORMATS, FORMATS[::-1]])
def test_converted_there_and_back_it_has_the_same_bytes(tmp_path, dev_teacher, prompt_file, one, other):
    text_build(tmp_path / "a", dev_teacher, prompt_file, format=one)
    convert(Cache.open(tmp_path / "a"), tmp_path / "b", Silent(), format=other)
    convert(Cache.open(tmp_path / "b"), tmp_path / "c", Silent(), format=one)
    assert data_files(tmp_path / "c") == data_files(tmp_path / "a")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("way", ["teacher", "copy"])
def test_a_lost_shard_is_found_and_repaired(tmp_path, dev_teacher, prompt_file, format, way):
    text_build(tmp_path / "a", dev_teacher, prompt_file, format=format)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    lost = next(path for path in (tmp_path / "a").rglob("*") if path.name in ("0", "000001.tar") and path.is_file())
    lost.unlink()
    assert [problem.shard[0] for problem in verify(tmp_path / "a", Silent()).problems] == ["embeddings"]
    if way == "copy":
        repair_cache(tmp_path / "a", tmp_path / "copy", Silent())
    else:
        teacher = find_teacher(str(dev_teacher), BUILD_PARTS)
        rebuild(tmp_path / "a", teacher, CPU, Silent(), batch_size=None, allow_mismatch=False)
    assert verify(tmp_path / "a", Silent()).problems == ()
    assert data_files(tmp_path / "a") == data_files(tmp_path / "copy")


@pytest.mark.slow
def test_on_a_store_it_has_the_bytes_of_a_local_one(s3, tmp_path, dev_teacher, prompt_file, more_prompts):
    for place in (f"{s3.url}/c", tmp_path / "c"):
        text_build(place, dev_teacher, prompt_file)
        text_build(place, dev_teacher, more_prompts, extend=True)
    folder = open_folder(f"{s3.url}/c")
    remote = {name: folder.read(name) for name in folder.names() if not name.startswith("commits/")}
    assert remote == data_files(tmp_path / "c")
    convert(Cache.open(f"{s3.url}/c"), f"{s3.url}/tars", Silent(), format="webdataset")
    convert(Cache.open(f"{s3.url}/tars"), tmp_path / "back", Silent(), format="zarr")
    assert data_files(tmp_path / "back") == data_files(tmp_path / "c")
    open_folder(f"{s3.url}/c").remove("embeddings.zarr/encoder_hidden_states/c/0/0/0")
    repair_cache(f"{s3.url}/c", tmp_path / "c", Silent())
    assert verify(f"{s3.url}/c", Silent()).problems == ()


def test_the_two_kinds_are_never_mixed(tmp_path, dev_teacher, prompt_file):
    text_build(tmp_path / "text", dev_teacher, prompt_file)
    build_cache(tmp_path / "full", dev_teacher, prompt_file)
    text, full = Cache.open(tmp_path / "text"), Cache.open(tmp_path / "full")
    for order in ([text, full], [full, text]):
        refused = f"{text.folder} is a text cache and {full.folder} has trajectories: the two kinds cannot be merged"
        with pytest.raises(SettingsMismatchError, match=re.escape(refused)):
            merge(order, tmp_path / "both", Silent())
    with pytest.raises(
        SettingsMismatchError, match="is a text cache, without trajectories, requested was a cache with"
    ):
        build_cache(tmp_path / "text", dev_teacher, prompt_file)
    with pytest.raises(SettingsMismatchError, match="is a cache with trajectories, requested was a text cache"):
        text_build(tmp_path / "full", dev_teacher, prompt_file)
    what = f"replay needs trajectories, but {text.folder} is a text cache"
    with pytest.raises(NoTrajectoriesError, match=re.escape(what)):
        text.require_trajectories("replay")
    full.require_trajectories("replay")
    with pytest.raises(NoTrajectoriesError, match="is a text cache"):
        _ = text.manifest.sampling


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"steps": 4}, "--steps is given (4) with --text-only, which records no trajectories"),
        ({"samples_per_prompt": 2}, "--samples-per-prompt is given (2) with --text-only"),
        ({"store_embeddings": False}, "--no-store-embeddings is given (False) with --text-only"),
        ({"compression": "int8"}, "compression int8"),
    ],
)
def test_options_of_trajectories_are_refused(tmp_path, dev_teacher, prompt_file, flags, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        build_cache(tmp_path / "c", dev_teacher, prompt_file, **{"steps": 20, "text_only": True} | flags)
    assert not (tmp_path / "c").exists()


def test_repeated_prompts_are_refused(tmp_path, dev_teacher, prompt_file):
    with pytest.raises(SettingsError, match="--prompts has :repeat= with --text-only: it multiplies the samples"):
        text_build(tmp_path / "c", dev_teacher, f"{prompt_file}:repeat=2")
    assert not (tmp_path / "c").exists()


def test_the_sample_stage_is_refused(tmp_path, dev_teacher, prompt_file):
    config = WorkerConfig(stage="sample", batch_size=2)
    with pytest.raises(SettingsError, match=r"--stage sample and --text-only cannot be combined: a text cache has no"):
        text_build(tmp_path / "c", dev_teacher, prompt_file, config=config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": "stored"}, "--latents stored: the source is a text cache, which has only embeddings"),
        ({"embeddings": "none"}, "--no-store-embeddings: the source is a text cache"),
        ({"compression": "int8"}, "--compression: compression int8 rounds predictions, of which a text cache has none"),
    ],
)
def test_conversions_that_need_trajectories_are_refused(tmp_path, dev_teacher, prompt_file, change, said):
    text_build(tmp_path / "c", dev_teacher, prompt_file)
    with pytest.raises(SettingsError, match=re.escape(said)):
        convert(Cache.open(tmp_path / "c"), tmp_path / "d", Silent(), **change)
