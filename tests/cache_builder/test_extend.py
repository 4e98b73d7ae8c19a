"""`build --extend`: two steps give what one gives, bit for bit; what was there is not touched."""

import json
import sys
from pathlib import Path

import pytest

from secondcast import cli
from secondcast.storage_schemas.errors import SettingsMismatchError
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache, data_files
from tests.cache_builder.test_codec_flags import StopIn, holds_embeddings
from tests.trainer.conftest import t5_config
from tests.trainer.test_train import run_training

__all__ = ["t5_config"]

BOTH = pytest.mark.parametrize("form", ["zarr", "webdataset"])
FP32 = {"dtype": "float32", "batch_size": 3, "steps": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Files of the first six prompts, of the next three, and of all."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"a red dog {i}\n" for i in range(9)]
    parts = {"all": lines, "first": lines[:6], "more": lines[6:], "two": lines[1:3]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("".join(part))
    return {name: folder / f"{name}.txt" for name in parts}


def touched(path: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}


def shard_files(path: Path) -> dict[str, bytes]:
    return {
        n: d for n, d in data_files(path).items() if n.split("/")[0].split(".")[0] in ("trajectories", "embeddings")
    }


@pytest.mark.slow
@BOTH
def test_more_prompts_then_more_samples_give_the_shards_of_a_build_of_everything_at_once(
    tmp_path, dev_teacher, texts, form
):
    build_cache(tmp_path / "c", dev_teacher, texts["first"], format=form, **FP32)
    before = touched(tmp_path / "c")
    result = build_cache(tmp_path / "c", dev_teacher, texts["more"], format=form, extend=True, **FP32)
    assert (result.prompts, result.trajectories) == (9, 9)
    result = build_cache(
        tmp_path / "c", dev_teacher, texts["all"], format=form, extend=True, samples_per_prompt=2, **FP32
    )
    assert (result.prompts, result.trajectories) == (9, 18)
    build_cache(tmp_path / "whole", dev_teacher, texts["all"], format=form, samples_per_prompt=2, **FP32)
    # The batches agree here, and so the files of all shards: those of zarr's metadata too.
    assert shard_files(tmp_path / "c") == shard_files(tmp_path / "whole")
    after = touched(tmp_path / "c")
    kept = [n for n in before if n in shard_files(tmp_path / "c") or n.startswith(("commits/t", "commits/e", "tok"))]
    assert {n: after[n] for n in kept if not n.endswith("zarr.json")} == {
        n: before[n] for n in kept if not n.endswith("zarr.json")
    }
    assert Cache.open(tmp_path / "c").finished and verify(tmp_path / "c", Silent()).problems == ()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("stage", "count"), [("text", 1), ("sample", 2)])
def test_an_interrupted_extension_goes_on_by_the_same_command(tmp_path, dev_teacher, texts, form, stage, count):
    flags = {"format": form, "extend": True, "samples_per_prompt": 2, **FP32}
    for name in ("c", "whole"):
        build_cache(tmp_path / name, dev_teacher, texts["first"], format=form, **FP32)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, texts["all"], progress=StopIn(stage, count), **flags)
    cache = Cache.open(tmp_path / "c")
    assert not cache.finished and (cache.planned, len(cache) < 18) == (18, True)
    for _ in range(2):
        build_cache(tmp_path / "c", dev_teacher, texts["all"], **flags)
    build_cache(tmp_path / "whole", dev_teacher, texts["all"], **flags)
    assert Cache.open(tmp_path / "c").finished and data_files(tmp_path / "c") == data_files(tmp_path / "whole")


@pytest.mark.thorough
def test_an_unfinished_build_may_be_extended(tmp_path, dev_teacher, texts):
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", dev_teacher, texts["first"], progress=StopIn("sample", 2), **FP32)
    build_cache(tmp_path / "c", dev_teacher, texts["more"], extend=True, **FP32)
    build_cache(tmp_path / "whole", dev_teacher, texts["all"], **FP32)
    assert Cache.open(tmp_path / "c").finished and shard_files(tmp_path / "c") == shard_files(tmp_path / "whole")


@pytest.mark.thorough
@BOTH
def test_embeddings_that_are_not_kept_are_made_again_only_where_they_are_needed(tmp_path, dev_teacher, texts, form):
    flags = {"format": form, "store_embeddings": False, **FP32}
    build_cache(tmp_path / "c", dev_teacher, texts["first"], **flags)
    with pytest.raises(KeyboardInterrupt):
        build_cache(
            tmp_path / "c",
            dev_teacher,
            texts["two"],
            extend=True,
            samples_per_prompt=2,
            progress=StopIn("sample", 1),
            **flags,
        )
    # Prompts 1 and 2 lie in the first of two embedding shards.
    assert sorted(p.name for p in (tmp_path / "c/commits").glob("embeddings-*")) == ["embeddings-000000.json"]
    build_cache(tmp_path / "c", dev_teacher, texts["two"], extend=True, samples_per_prompt=2, **flags)
    assert not holds_embeddings(tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    assert cache.finished and len(cache) == 8 and verify(tmp_path / "c", Silent()).problems == ()


@pytest.mark.thorough
def test_training_on_an_extended_cache_opens_and_holds_out_the_same_prompts(tmp_path, dev_teacher, t5_config, texts):
    # By its id, the last one is held out.
    file = tmp_path / "p.txt"
    file.write_text("".join(f"a red dog {i}\n" for i in range(8)) + "two dogs 31\n")
    build_cache(tmp_path / "c", dev_teacher, file, **FP32)
    held_out = [prompt.text for prompt in Cache.open(tmp_path / "c").prompts if prompt.held_out]
    build_cache(tmp_path / "c", dev_teacher, texts["all"], extend=True, samples_per_prompt=2, **FP32)
    cache = Cache.open(tmp_path / "c")
    assert [prompt.text for prompt in cache.prompts if prompt.held_out] == held_out == ["two dogs 31"]
    run = run_training(tmp_path / "run", tmp_path / "c", dev_teacher, t5_config, steps=2)
    assert list(run.glob("**/*.safetensors"))


@pytest.mark.thorough
def test_other_settings_are_refused_before_anything_changes(tmp_path, dev_teacher, schnell_teacher, texts):
    build_cache(tmp_path / "c", dev_teacher, texts["first"], **FP32)
    before = touched(tmp_path / "c")
    with pytest.raises(
        SettingsMismatchError, match="c was built with sampling.seed = 0, requested 4: every recorded traj"
    ):
        build_cache(tmp_path / "c", dev_teacher, texts["all"], extend=True, seed=4, **FP32)
    with pytest.raises(SettingsMismatchError, match=r"c was built with teacher\.\S+ = "):
        build_cache(tmp_path / "c", schnell_teacher, texts["all"], extend=True, **FP32)
    with pytest.raises(
        SettingsMismatchError, match=r"prompts.count = 6, .* 9: .*; `secondcast build --extend` adds prompts "
    ):
        build_cache(tmp_path / "c", dev_teacher, texts["all"], **FP32)
    with pytest.raises(
        SettingsMismatchError,
        match=r"segments\[0\].samples_per_prompt = 1, requested 2: .*; `secondcast build --extend` adds prompts or s",
    ):
        build_cache(tmp_path / "c", dev_teacher, texts["first"], samples_per_prompt=2, **FP32)
    assert touched(tmp_path / "c") == before


@pytest.mark.thorough
def test_the_command_line_extends_and_says_by_what(tmp_path, texts, dev_teacher, monkeypatch, capsys):
    def secondcast(*words):
        monkeypatch.setattr(sys, "argv", ["secondcast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    words = ("build", tmp_path / "c", "--teacher", dev_teacher, "--steps", 2, "--shard-size", 4, "--prompts")
    assert secondcast(*words, texts["first"])[0] == 0
    code, said, heard = secondcast(*words, texts["all"], "--extend", "--samples-per-prompt", 2)
    assert code == 0 and "18 trajectories of 9 prompts" in said
    assert "extended by 12 trajectories and 3 prompts, to 18 trajectories of 9 prompts" in " ".join(heard.split())
    segments = json.loads((tmp_path / "c/manifest.json").read_bytes())["prompts"]["segments"]
    assert [(g["first_prompt"], g["prompts"], g["first_sample"], g["samples_per_prompt"]) for g in segments] == [
        (0, 6, 0, 1), (0, 6, 1, 1), (6, 3, 0, 2),
    ]  # fmt: skip
    code, said, heard = secondcast(*words, texts["two"], "--extend")
    assert code == 0 and "nothing to add: everything is among the 18 trajectories of 9 prompts" in " ".join(
        heard.split()
    )
