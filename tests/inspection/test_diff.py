"""`inspect diff`: every difference by its field, both values and what follows; without torch and webdataset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secondcast.inspection.diff import compare, diff_lines
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.storage_schemas.caches import some_prompts, write_keyed_cache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def a(tmp_path):
    write_keyed_cache(tmp_path / "a", some_prompts(6))
    return Cache.open(tmp_path / "a")


def other(tmp_path, prompts=6, **changes):
    write_keyed_cache(tmp_path / "b", some_prompts(prompts), **changes)
    return Cache.open(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "line", "verdict"),
    [
        (
            {"seed": 3},
            "sampling.seed: 0 | 3: different noise: the two can train one student together, but not be merged",
            "can resume: no, merge: no, train together: yes",
        ),
        (
            {"format": "webdataset"},
            'sampling.storage.format: "zarr" | "webdataset": the same trajectories in another storage format: '
            "`secondcast convert` makes them equal",
            "can resume: no, merge: no, train together: yes",
        ),
        (
            {"prompts": 5},
            "prompts.count: 6 | 5: different prompts, or another order or sharding of them: they can still be merged",
            "can resume: no, merge: yes, train together: yes",
        ),
        (
            {"dtype": "float32"},
            'sampling.dtype: "bfloat16" | "float32": different trajectories: the two can train one student together, '
            "but not be merged",
            "can resume: no, merge: no, train together: yes",
        ),
    ],
)
def test_a_difference_is_named_with_both_values_and_what_follows(tmp_path, a, changes, line, verdict):
    facts = compare(a, other(tmp_path, **changes))
    lines = diff_lines(facts)
    assert line in lines and lines[-1] == verdict and not facts["identical"] and facts["shards"] is None
    assert not [found for found in facts["differences"] if found["field"].startswith("metadata")]
    assert json.loads(json.dumps(facts)) == facts


def test_another_teacher_is_the_end_of_it(tmp_path, a):
    b = other(tmp_path)
    teacher = b.manifest.teacher.model_copy(update={"weights": {"transformer/a.safetensors": "11"}})
    b.manifest = b.manifest.model_copy(update={"teacher": teacher})
    lines = diff_lines(compare(a, b))
    assert lines == [
        'teacher.weights.transformer/a.safetensors: "00" | "11": different teachers: the two caches can neither train '
        "one "
        "student together nor be merged",
        "can resume: no, merge: no, train together: no",
    ]


def test_long_lists_are_named_by_the_first_values_that_differ_and_a_count_of_the_rest(tmp_path, a):
    b = other(tmp_path)
    sigmas = tuple(i / 32 for i in range(32, -1, -1))
    follows = "different trajectories: the two can train one student together, but not be merged"
    for count, more in ((2, None), (4, "and 1 further difference; --json shows both values in full")):
        others = (*(sigma - 4 for sigma in sigmas[:count]), *sigmas[count:])
        for cache, values in ((a, sigmas), (b, others)):
            sampling = cache.manifest.sampling.model_copy(update={"sigmas": values, "guidance": (values[0],)})
            cache.manifest = cache.manifest.model_copy(update={"sampling_or_none": sampling})
        lines = [line for line in diff_lines(compare(a, b)) if "sigmas" in line]
        shown = min(3, count)
        assert lines[:shown] == [f"sampling.sigmas[{i}]: {sigmas[i]} | {others[i]}: {follows}" for i in range(shown)]
        assert lines[shown:] == ([] if more is None else [f"sampling.sigmas: {more}"])
        assert f"sampling.guidance: [1.0] | [-3.0]: {follows}" in diff_lines(compare(a, b))


def test_identical_caches_say_so(tmp_path, a):
    convert(a, tmp_path / "b", Silent())
    facts = compare(a, Cache.open(tmp_path / "b"))
    assert facts["identical"] and diff_lines(facts) == [
        "identical by their records: the same manifest and the same checksums of every shard; the files were not "
        "read (`secondcast inspect verify` does)",
        "can resume: yes, merge: yes, train together: yes",
    ]


def test_equal_settings_on_another_machine_are_compared_shard_by_shard(tmp_path, a):
    b = other(tmp_path, provenance={"device": "H100", "batch_size": 8}, leave_out=(("trajectories", 1),))
    lines = diff_lines(compare(a, b))
    assert lines == [
        'provenance.device: "made-up" | "H100": made by other versions or on another machine: bit equality is not '
        "guaranteed",
        "provenance.batch_size: null | 8: made by other versions or on another machine: bit equality is not guaranteed",
        f"shards: 3 equal, 0 with other bytes, 1 only in {tmp_path / 'a'}, 0 only in {tmp_path / 'b'}",
        "can resume: yes, merge: yes, train together: yes",
    ]


@pytest.mark.slow
def test_diff_and_zarr_conversion_need_neither_torch_nor_webdataset(tmp_path, a):
    other(tmp_path, format="webdataset")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['webdataset'] = None; from secondcast import cli; "
        "sys.argv = ['secondcast', *sys.argv[1:]]; cli.main()"
    )

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = run("inspect", "diff", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0 and "can resume: no, merge: no, train together: yes" in done.stdout, done.stderr
    done = run("inspect", "diff", tmp_path / "a", tmp_path / "a", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["identical"], done.stderr
    done = run("convert", tmp_path / "b", tmp_path / "c", "--format", "zarr")
    assert done.returncode == 0 and "6 trajectories of 6 prompts" in done.stdout, done.stderr
    assert compare(a, Cache.open(tmp_path / "c"))["identical"]
