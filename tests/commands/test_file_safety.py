"""No command deletes or overwrites a file that this tool did not write; a folder or disk that refuses is one line."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.commands.limits import NOBODY, outside_of_private_folders
from tests.commands.running import run_commands

pytestmark = pytest.mark.slow

TRAIN = [
    "train",
    "{out}/run",
    "--cache",
    "{made}/cache",
    "--student",
    "pocket-tiny",
    "--steps",
    "1",
    "--batch-size",
    "1",
]
TRAIN += ["--replay-check", "0", "-q"]
BUILD = ["build", "{out}/c", "--teacher", "pocket", "--prompts", "{made}/p.txt", "--limit", "2", "--steps", "1", "-q"]
GENERATE = ["generate", "teacher", "--teacher", "pocket", "--prompts", "{made}/p.txt", "--limit", "1", "--steps", "1"]
PICTURE = [
    "evaluate",
    "score",
    "{made}/run",
    "--pocket",
    "--num-prompts",
    "1",
    "--steps",
    "1",
    "--sample-grid",
    "{out}/p.png",
    "-q",
]
TABLE = [
    "evaluate",
    "table",
    "a={made}/run",
    "--cache",
    "{made}/cache",
    "--num-trajectories",
    "1",
    "--closed-loop",
    "0",
]
TABLE += ["--out", "{out}/t", "-q"]
IMAGES = ["inspect", "images", "{made}/cache", "0", "-q", "--out"]
REPAIR = ["repair", "{out}/c", "--from", "{made}/cache", "-q"]
SCORE = [
    "evaluate",
    "score",
    "{made}/run",
    "--cache",
    "{made}/cache",
    "--num-trajectories",
    "1",
    "--closed-loop",
    "0",
    "-q",
]
MINE = b"mine, and of nobody else"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A command that writes below {out}; {made} has what it reads.

    foreign: files of a user where it would write, relative to {out}. goes: whether it does its work beside them.
    before: prepares {out}, given {made} and it.
    """

    words: list[str]
    foreign: tuple[str, ...]
    goes: bool = False
    before: Callable[[Path, Path], object] = field(default=lambda made, out: None)

    def command(self, made: Path, out: Path, limit: int | None = None) -> dict:
        return {"words": [word.format(made=made, out=out) for word in self.words], "limit": limit}


def copied_cache(made: Path, out: Path) -> None:
    shutil.copytree(made / "cache", out / "c")


def damaged_cache(made: Path, out: Path) -> None:
    copied_cache(made, out)
    (out / "c/prompts.jsonl").unlink()
    (out / "c/manifest.json").write_bytes(b"\x00")


ROWS = {
    "build": Row(words=BUILD, foreign=("c/prompts.jsonl",)),
    "build beside": Row(words=BUILD, foreign=("c/thesis.txt",)),
    "init-student": Row(
        words=["init-student", "{out}/s", "--teacher", "pocket", "--prompts", "{made}/p.txt", "--size", "pocket-tiny",
               "-q"],
        foreign=("s/config.json",),
    ),
    "train": Row(words=TRAIN, foreign=("run/config.json", "run/metrics.jsonl")),
    "train beside": Row(words=TRAIN, foreign=("run/thesis.txt",)),
    "train --local-cache-dir": Row(
        words=[*TRAIN, "--local-cache-dir", "{out}/near", "--local-cache-gib", "0.001"],
        foreign=("near/mine.bin", "near/secondcast-shards/mine.bin"), goes=True,
    ),
    "export": Row(words=["export", "{made}/run", "{out}/s", "-q"], foreign=("s/config.json",)),
    "export distillt5": Row(words=["export", "{made}/run", "{out}/s", "--to", "distillt5", "-q"], foreign=("s/a",)),
    "export comfyui": Row(
        words=["export", "{made}/run", "{out}/s.safetensors", "--to", "comfyui", "-q"], foreign=("s.safetensors",)
    ),
    "generate": Row(words=[*GENERATE, "--out", "{out}/g", "-q"], foreign=("g/index.jsonl", "g/000000.png")),
    "evaluate score": Row(words=[*SCORE, "--out", "{out}/e.json"], foreign=("e.json",)),
    "evaluate score --sample-grid": Row(words=PICTURE, foreign=("p.png",)),
    "evaluate table": Row(words=TABLE, foreign=("t/errors.md",)),
    "evaluate table beside": Row(
        words=TABLE, foreign=("t/thesis.txt", "t/table.md", "t/evaluated/mine.json"), goes=True
    ),
    "inspect images": Row(words=[*IMAGES, "{out}/i.png"], foreign=("i.png",)),
    "inspect images folder": Row(words=[*IMAGES, "{out}/i"], foreign=("i/sheet.png",)),
    "inspect compare": Row(
        words=["inspect", "compare", "{made}/cache", "0", "--student", "{made}/run", "--out", "{out}/c.png", "-q"],
        foreign=("c.png",),
    ),
    "inspect report": Row(
        words=["inspect", "report", "{made}/cache", "--num-strips", "0", "--out", "{out}/r.html", "-q"],
        foreign=("r.html",),
    ),
    "convert": Row(
        words=["convert", "{made}/cache", "{out}/d", "--format", "webdataset", "-q"], foreign=("d/manifest.json",)
    ),
    "subset": Row(words=["subset", "{made}/cache", "{out}/d", "--num-prompts", "1", "-q"],
    foreign=("d/prompts.offsets",)),
    "merge": Row(words=["merge", "{made}/cache", "{made}/cache", "{out}/d", "-q"], foreign=("d/commits/index.json",)),
    "repair": Row(words=REPAIR, foreign=("c/manifest.json", "c/prompts.jsonl")),
    "repair damaged": Row(
        words=REPAIR, foreign=("c/.notes.1-2.tmp", "beside.txt"), goes=True, before=damaged_cache
    ),
    "prompts pocket": Row(words=["prompts", "pocket", "{out}/p.txt", "--num-prompts", "300"], foreign=("p.txt",)),
    "prompts commontext": Row(
        words=["prompts", "commontext", "{out}/p.json", "--num-prompts", "300"], foreign=("p.json",)
    ),
    "prompts compbench": Row(words=["prompts", "compbench", "{made}/bench", "{out}/p.jsonl"], foreign=("p.jsonl",)),
    "prompts laion": Row(words=["prompts", "laion", "{made}/laion.parquet", "{out}/p.jsonl"], foreign=("p.jsonl",)),
    "demo": Row(words=["demo", "{out}/demo", "--num-prompts", "64", "-q"], foreign=("demo/prompts.txt",)),
}  # fmt: skip
# A demo that is not refused takes minutes.
SHORT = [name for name in ROWS if name != "demo"]


@pytest.fixture(scope="module")
def place():
    """A folder that other users can enter."""
    with outside_of_private_folders() as found:
        (found / "home").mkdir()
        (found / "home").chmod(0o777)
        yield found


@pytest.fixture(scope="module")
def made(place):
    """A cache, a run and a prompt set, readable for all."""
    folder = place / "made"
    (folder / "bench").mkdir(parents=True)
    for name in ("color", "complex", "non_spatial", "shape", "spatial", "texture"):
        (folder / f"bench/{name}_train.txt").write_text("".join(f"a {name} thing number {n}\n" for n in range(50)))
    parquet.write_table(pa.table({"TEXT": ["a cat"], "AESTHETIC_SCORE": [7.0]}), folder / "laion.parquet")
    words = [
        ["prompts", "pocket", f"{folder}/p.txt", "--num-prompts", "70"],
        ["build", f"{folder}/cache", "--teacher", "pocket", "--prompts", f"{folder}/p.txt", "--steps", "1", "-q"],
        [word.replace("{made}", str(folder)).replace("{out}", str(folder)) for word in TRAIN],
    ]  # fmt: skip
    for found in run_commands([{"words": one, "limit": None} for one in words], home=place / "home"):
        assert found["code"] == 0, found
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(found: dict) -> None:
    assert found["code"] == 1 and "Traceback" not in found["heard"], found
    lines = [line for line in found["heard"].splitlines() if line.startswith("secondcast: ")]
    assert len(lines) == 1 and found["heard"].strip().splitlines()[-1] == lines[0], found


@pytest.mark.skipif(os.name != "posix", reason="permissions and limits are those of POSIX")
def test_files_of_a_user_stay_byte_for_byte(place, made):
    given, commands = {}, []
    for number, (_, row) in enumerate(ROWS.items()):
        out = place / f"foreign-{number}"
        out.mkdir()
        row.before(made, out)
        for name in row.foreign:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(MINE)
        given[out] = contents(out)
        commands.append(row.command(made, out))
    inputs = contents(made)
    answers = run_commands(commands, home=place / "home")
    for (name, row), (out, before), found in zip(ROWS.items(), given.items(), answers, strict=True):
        for file in row.foreign:
            assert (out / file).read_bytes() == MINE, (name, file, found)
        if row.goes:
            assert found["code"] == 0, (name, found)
        else:
            assert_one_line(found)
            assert contents(out) == before, (name, found)
    assert contents(made) == inputs


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_disk_that_is_full_is_one_line_and_the_same_command_works_later(place, made, limit):
    """A limit on the size of files stands for the disk: the system refuses in the middle of a file."""
    outs, commands = [], []
    for number, name in enumerate(SHORT):
        out = place / f"full-{limit}-{number}"
        out.mkdir()
        ROWS[name].before(made, out)
        (out / "beside.txt").write_bytes(MINE)
        outs.append(out)
        commands += [ROWS[name].command(made, out, limit), ROWS[name].command(made, out)]
    answers = iter(run_commands(commands, home=place / "home"))
    refused = 0
    for name, out in zip(SHORT, outs, strict=True):
        full, later = next(answers), next(answers)
        if full["code"] != 0:
            refused += 1
            assert_one_line(full)
            assert "too large" in full["heard"], (name, full)
        assert later["code"] == 0, (name, full, later)
        assert (out / "beside.txt").read_bytes() == MINE
        assert not list(out.rglob("*.tmp")), name
    assert refused >= (0.9 if limit == 100 else 0.5) * len(SHORT)


def as_nobody(rows: dict[str, Row], outs: list[Path], place: Path, made: Path) -> list[dict]:
    """What rows give to another user, who may read {made} and not write below {out}."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: needs root, to run commands as another user")
    before = []
    for number, row in enumerate(rows.values()):
        out = place / f"before-{number}"
        out.mkdir(exist_ok=True)
        row.before(made, out)
        before.append(row.command(made, out))
    commands = [row.command(made, out) for row, out in zip(rows.values(), outs, strict=True)]
    (place / "home/weight_hashes.json").unlink(missing_ok=True)
    return run_commands(commands, user=NOBODY, home=place / "home", before=before)


def test_a_folder_that_may_not_be_written_is_one_line(place, made):
    rows, outs = {name: ROWS[name] for name in SHORT}, []
    for number, row in enumerate(rows.values()):
        out = place / f"closed-{number}"
        out.mkdir()
        row.before(made, out)
        (out / "beside.txt").write_bytes(MINE)
        for path in (out, *out.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        outs.append(out)
    before = [contents(out) for out in outs]
    answers = as_nobody(rows, outs, place, made)
    for name, out, kept, found in zip(rows, outs, before, answers, strict=True):
        assert_one_line(found)
        assert "ermission denied" in found["heard"], (name, found)
        assert contents(out) == kept, name


def test_checkpoints_that_may_not_be_read_do_not_begin_a_run_again(place, made):
    out = place / "theirs"
    shutil.copytree(made / "run", out / "run")
    for path in (out, *out.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    (optimizer,) = out.glob("run/checkpoint-*/optimizer.safetensors")
    optimizer.chmod(0)
    before = {path: data for path, data in contents(out).items() if path.name != "lock"}
    (found,) = as_nobody({"train": ROWS["train"]}, [out], place, made)
    assert_one_line(found)
    assert f"{optimizer} cannot be read (Permission denied): the checkpoint is not damaged" in found["heard"]
    assert {path: data for path, data in contents(out).items() if path.name != "lock"} == before
