"""`inspect verify`: what is wrong in a table, and commands that put it right and do."""

import json
import shutil

import pytest

from secondcast.inspection.repairing import need_of, problem_lines, repair_commands
from secondcast.storage_schemas.maintenance.repair import repair_cache
from secondcast.storage_schemas.maintenance.verify import Problem, Report, verify
from secondcast.storage_schemas.progress import Silent
from tests.commands.test_cli import secondcast
from tests.storage_schemas.caches import write_cache

FILE = "trajectories.zarr/noise/c/1/0/0"


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    return tmp_path / "c"


def test_a_whole_cache_is_one_line(cache, capsys):
    code, said, _ = secondcast("inspect", "verify", cache, "--quiet", capsys=capsys)
    assert code == 0 and said.count("\n") == 1 and said.endswith(", 0 problems\n")
    code, said, _ = secondcast("inspect", "verify", cache, "--quiet", "--json", capsys=capsys)
    assert code == 0 and json.loads(said)["repair"] is None


def test_each_problem_is_a_row_and_the_commands_stand_below(cache, capsys):
    (cache / FILE).unlink()
    (cache / "foreign file").write_text("")
    code, said, _ = secondcast("inspect", "verify", cache, "--quiet", capsys=capsys)
    assert code == 1 and said.splitlines()[0].endswith(", 2 problems")
    assert said.splitlines()[1:] == [
        "shard           file                             problem",
        f"trajectories 1  {FILE}  is missing",
        "-               foreign file                     is not a file of this cache: delete it",
        "to repair:",
        f"  rm '{cache}/foreign file'",
        f"  secondcast repair {cache} --teacher made-up",
        "  (with another copy of the cache: --from COPY instead of --teacher)",
    ]
    code, said, _ = secondcast("inspect", "verify", cache, "--quiet", "--json", capsys=capsys)
    facts = json.loads(said)
    assert code == 1 and [problem["needs"] for problem in facts["problems"]] == ["shard", "delete"]
    assert facts["repair"] == {
        "commands": [f"rm '{cache}/foreign file'", f"secondcast repair {cache} --teacher made-up"],
        "otherwise": "with another copy of the cache: --from COPY instead of --teacher",
    }


def test_a_narrow_terminal_gets_the_problem_below_its_file_and_loses_nothing(cache):
    whole = (cache / FILE).read_bytes()
    (cache / FILE).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    report = verify(cache, Silent())
    wide, narrow = (problem_lines(str(cache), report, None, width=width) for width in (None, 60))
    assert narrow[1] == f"trajectories 1  {FILE}" and narrow[2].startswith(" " * 18 + "has checksum")
    assert all(len(line) <= 60 for line in narrow[:4])
    assert " ".join(" ".join(narrow[1 : narrow.index("to repair:")]).split()) == " ".join(wide[1].split())
    assert f"  secondcast repair {cache} --teacher TEACHER" in narrow


@pytest.mark.parametrize("building", [False, True])
def test_what_a_repair_can_do_alone_is_told_so_and_it_can(cache, building):
    unfinished = ("commits/index.json", "commits/embeddings-000001.json")
    for name in unfinished if building else ():
        (cache / name).unlink()
    for name in (
        FILE, "prompts.jsonl", "prompts.offsets", "trajectories.zarr/noise/zarr.json", "embeddings.zarr/zarr.json",
        "commits/trajectories-000001.json", "commits/embeddings-000000.json", "commits/index.json",
    ):  # fmt: skip
        if building and name in unfinished:
            continue
        whole = (cache / name).read_bytes()
        (cache / name).write_bytes(whole[:-2])
        commands = repair_commands(str(cache), verify(cache, Silent()), "made-up")
        left = repair_cache(cache, None, Silent()).left
        assert (commands == [f"secondcast repair {cache}"]) == (left == ()), name
        assert left == () or commands[-1].split()[3] in ("--teacher", "--from")
        (cache / name).write_bytes(whole)


def test_a_file_of_an_object_store_is_deleted_by_its_stores_command():
    problem = Problem(path="foo", message="s3://b/c/foo is not a file of this cache: delete it", foreign=True)
    report = Report(problems=(problem,), shards=0, bytes=0, missing=0)
    assert need_of(problem, report) == "delete"
    assert repair_commands("s3://b/c/", report, None) == ["aws s3 rm s3://b/c/foo"]
    assert repair_commands("gs://b/c", report, None) == ["gsutil rm gs://b/c/foo"]
