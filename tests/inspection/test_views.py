"""Every view of a cache works on both formats, while it is being built, and from an object store."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secondcast.inspection.show import describe, first_trajectory, samples_per_prompt_of, trajectory_lines
from secondcast.inspection.summary import summarise
from secondcast.inspection.summary_text import screen_lines, summary_lines
from secondcast.inspection.text_layout import entry_lines, table_lines
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.maintenance.convert import convert
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Segment
from tests.commands.test_cli import secondcast
from tests.evaluation.recorded import ROWS
from tests.storage_schemas.caches import some_prompts, write_cache, write_keyed_cache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def by_format(recorded, tmp_path_factory):
    tars = tmp_path_factory.mktemp("tars") / "c"
    convert(Cache.open(recorded), tars, Silent(), format="webdataset")
    return {"zarr": recorded, "webdataset": tars}


@pytest.fixture(params=["finished", "being built", "s3"])
def place(request):
    """Where and in which state a cache is looked at."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return request.param


def put(place, cache, tmp_path, request):
    """The cache in that place and state; the number of its trajectories there."""
    if place == "s3":
        url = request.getfixturevalue("s3").url
        for file in (file for file in cache.rglob("*") if file.is_file()):
            open_folder(url).replace(file.relative_to(cache).as_posix(), file.read_bytes())
        return url, 12
    shutil.copytree(cache, tmp_path / "c")
    if place == "finished":
        return tmp_path / "c", 12
    (tmp_path / "c/commits/index.json").unlink()
    (tmp_path / "c/commits/trajectories-000002.json").unlink()
    return tmp_path / "c", 8


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_every_view_works_on_both_formats_while_building_and_from_an_object_store(
    tmp_path, by_format, form, place, student, dev_teacher, request, capsys
):
    pytest.importorskip("skimage")
    cache, count = put(place, by_format[form], tmp_path, request)

    def ask(*words) -> str:
        code, said, heard = secondcast("inspect", *words, capsys=capsys)
        assert code == 0, heard
        return said

    said = ask("summary", cache)
    assert f"{count} of 12 committed" in said and f"({form}, lossless" in said
    looked_at = "not checked" if place == "s3" else "present with the recorded sizes"
    assert looked_at in said and f"`secondcast inspect verify {cache}` does" in said
    assert ("(finished)" in said) == (place != "being built")
    facts = json.loads(ask("summary", cache, "--json"))
    assert [array["name"] for array in facts["storage"]["arrays"]] == [
        "velocity", "noise", "final_latent", "guidance", "encoder_hidden_states"
    ]  # fmt: skip
    assert all(array["stored_bytes"] > 0 for array in facts["storage"]["arrays"])
    prompt = json.loads(ask("show", cache, "5", "--json"))["prompt"]
    assert prompt in ask("show", cache, "--prompt", prompt) and prompt in ask("show", cache, "--grep", prompt)
    ask("images", cache, "1", "--teacher", dev_teacher, "--out", tmp_path / "one.png", "--timesteps", "0,2")
    assert Image.open(tmp_path / "one.png").width == 90 + 3 * 100
    words = ["compare", cache, "4", "--student", student, "--backbone", dev_teacher, "--batch-size", ROWS]
    assert "1 trajectory of " in ask(*words, "--out", tmp_path / "compare.png", "--quiet")
    assert Image.open(tmp_path / "compare.png").height > 128
    assert ask("verify", cache, "--quiet").count("\n") == 1


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_bytes_by_array_are_those_of_the_files(tmp_path, form):
    write_cache(tmp_path / "c", count=30, format=form, compression="lossless", shard_size=16)
    arrays = {array["name"]: array for array in summarise(Cache.open(tmp_path / "c"))["storage"]["arrays"]}
    assert arrays["velocity"]["raw_bytes"] == 30 * 3 * 4 * 2 * 2
    if form == "zarr":
        for name, array in arrays.items():
            files = [f for f in (tmp_path / "c").glob(f"*.zarr/{name}/c/**/*") if f.is_file()]
            assert array["stored_bytes"] == sum(f.stat().st_size for f in files) and not array["sampled"]
        return
    from safetensors import deserialize

    def stored(name):
        import tarfile

        total = 0
        for tar in (tmp_path / "c").glob("*/*.tar"):
            with tarfile.open(tar) as members:
                samples = [members.extractfile(m).read() for m in members if m.name.endswith(".safetensors")]
            total += sum(len(tensor["data"]) for s in samples for n, tensor in deserialize(s) if n == name)
        return total

    assert arrays["guidance"]["stored_bytes"] == stored("guidance") == 120 and not arrays["guidance"]["sampled"]
    assert arrays["velocity"]["sampled"] == 16
    assert arrays["velocity"]["stored_bytes"] == pytest.approx(stored("velocity"), rel=0.05)
    said = screen_lines(summarise(Cache.open(tmp_path / "c")))
    assert any(line.strip().startswith("velocity") and " ~ " in line for line in said)
    for tar in (tmp_path / "c").glob("trajectories/*.tar"):
        tar.write_bytes(b"")
    facts = summarise(Cache.open(tmp_path / "c"))
    assert {a["name"]: a["stored_bytes"] for a in facts["storage"]["arrays"]}["velocity"] is None
    assert "  ?: the headers of the samples are unreadable" in screen_lines(facts)


def test_a_file_that_is_lost_or_cut_shows_in_the_summary(tmp_path):
    write_cache(tmp_path / "c")
    (tmp_path / "c/trajectories.zarr/noise/c/0/0/0").unlink()
    (tmp_path / "c/trajectories.zarr/noise/c/1/0/0").write_bytes(b"")
    said = dict(summary_lines(summarise(Cache.open(tmp_path / "c"))))["integrity"]
    assert said == (
        f"4 of 4 shards have a record; of 10 files checked, 1 missing and 1 with another size, the first "
        f"trajectories.zarr/noise/c/0/0/0; checksums not compared (`secondcast inspect verify {tmp_path}/c` does)"
    )


def test_the_summary_says_on_what_and_how_fast_a_cache_was_built(tmp_path, recorded):
    facts = summarise(Cache.open(recorded))
    said = dict(summary_lines(facts))
    assert f"(attention sdpa, batch size {ROWS}, threads 1, torch " in said["built"]
    assert f"{facts['build']['trajectories_per_hour']:,.0f} trajectories per hour" in said["speed"]
    convert(Cache.open(recorded), tmp_path / "c", Silent())
    copied = dict(summary_lines(summarise(Cache.open(tmp_path / "c"))))["speed"]
    assert copied.startswith("copied in ") and f"from {recorded}; the recording speed is in their summaries" in copied


def test_time_in_which_several_worked_counts_once_and_pauses_do_not(tmp_path):
    from secondcast.inspection.summary import built_facts

    write_cache(tmp_path / "c", count=16)
    times = ["00:01:40", "00:01:40", "00:03:20", "09:00:00"]
    made = [record for (kind, _), record in Cache.open(tmp_path / "c").records.items() if kind == "trajectories"]
    records = [
        record.model_copy(update={"seconds": 100.0, "finished_at": f"2026-01-01T{time}+00:00"})
        for record, time in zip(made, times, strict=True)
    ]
    built = built_facts(records)
    assert built["busy_seconds"] == 300.0 and built["seconds"] == 400.0 and built["workers"] == 1
    assert built["trajectories_per_hour"] == 16 / 300 * 3600
    together = built_facts([record.model_copy(update={"finished_at": records[0].finished_at}) for record in records])
    assert together["workers"] == 4 and together["busy_seconds"] == 100.0
    unknown = built_facts([record.model_copy(update={"finished_at": "at noon"}) for record in records])
    assert unknown["trajectories_per_hour"] is None and unknown["workers"] is None


def test_a_prompt_leads_to_its_own_trajectory_whatever_the_segments(tmp_path):
    segments = (
        Segment(first_prompt=0, prompts=2, first_sample=0, samples_per_prompt=3, shard_size=4),
        Segment(first_prompt=2, prompts=2, first_sample=0, samples_per_prompt=1, shard_size=4),
    )
    write_keyed_cache(
        tmp_path / "c", some_prompts(4), segments=segments, tokenizer={"words.txt": b""},
        leave_out=(("trajectories", 1),),
    )  # fmt: skip
    cache = Cache.open(tmp_path / "c")
    assert first_trajectory(cache, 3) == 7 and cache.trajectory(7).prompt == 3
    found = samples_per_prompt_of(cache, 1)
    assert [(one["index"], one["sample_index"], one["committed"]) for one in found] == [
        (1, 0, True), (3, 1, True), (5, 2, False)
    ]  # fmt: skip
    said = dict(line.strip().split("  ", 1) for line in trajectory_lines(describe(cache, 3), "c")[:7])
    assert said["sample"] == (
        "1, one of 3 of this prompt; the others are trajectories 1, 5 (not built yet): `secondcast inspect show c 1`"
    )
    assert "the only one of this prompt" in "\n".join(trajectory_lines(describe(cache, 7), "c"))


def test_numbers_that_are_not_finite_are_counted_and_leave_the_json_valid(tmp_path):
    from dataclasses import replace

    write_cache(tmp_path / "c", dtype="float32")
    cache = Cache.open(tmp_path / "c")
    whole = cache.trajectory(0)
    velocity = whole.velocity_KSC.copy()
    velocity[1, 0] = np.inf
    cache.trajectory = lambda index: replace(whole, velocity_KSC=velocity)
    facts = describe(cache, 0)
    assert [step["non_finite"] for step in facts["steps"]] == [0, 2, 0]
    assert [step["latent_non_finite"] for step in facts["steps"]] == [0, 0, 2]
    assert facts["steps"][1]["velocity_norm"] is None
    json.dumps(facts, allow_nan=False)
    lines = trajectory_lines(facts, "c")
    assert [line.split()[-3:] for line in lines if line.strip().startswith("1 ")] == [["0", "+", "2"]]
    assert facts["steps"][0]["latent_norm"] == pytest.approx(np.linalg.norm(whole.hidden_states_KSC[0]))


def test_tables_and_entries_lose_nothing_whatever_the_width():
    long = "word " * 40 + "x" * 100
    rows = [["a", long], ["bb", "1"]]
    assert table_lines(["name", "value"], rows)[1].split(None, 1)[1] == long
    narrow = table_lines(["name", "value"], [["a", "word " * 30], ["bb", "1"]], text_columns=(0, 1), width=40)
    assert (
        max(map(len, narrow)) <= 40
        and narrow[1].startswith("a     word word")
        and narrow[2].startswith(" " * 6 + "word")
    )
    assert " ".join(narrow).split().count("word") == 30
    for width in (30, 80, None):
        lines = entry_lines([("name", long), ("other", "1")], width=width)
        assert " ".join(" ".join(lines[:-1]).split()).removeprefix("name ") == long
        assert lines[-1] == "other  1"
        if width:
            assert all(len(line) <= width or "xxx" in line for line in lines)


@pytest.mark.thorough
def test_a_pipe_gets_whole_lines_at_any_width_and_no_view_in_numbers_loads_torch(tmp_path):
    prompts = some_prompts(2)
    write_keyed_cache(tmp_path / "c", prompts, tokenizer={"words.txt": b""}, provenance={"device": "made-up " * 30})
    code = (
        "import sys; sys.modules['torch'] = sys.modules['webdataset'] = sys.modules['zarr'] = None\n"
        "from secondcast import cli\n"
        "cli.app(['inspect', 'summary', sys.argv[1]], standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"COLUMNS": "40", "PATH": "/usr/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout and any(("made-up " * 30).strip() in line for line in done.stdout.splitlines())
