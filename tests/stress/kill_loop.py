"""Does a kill at any moment lose or damage anything? `taskset -c 3 python -m tests.stress.kill_loop`.

Builders are killed with SIGKILL at random times, one alone or one of two on the same cache; after every kill all that
was committed is compared with an uninterrupted build. A fast builder of made-up numbers waits a little before each
step of the commit protocol, so that kills land in all of them; the other is `secondcast build --teacher pocket`.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import xxhash

from secondcast.storage_schemas.errors import ShardLockedError
from secondcast.storage_schemas.maintenance.verify import INDEX_PATH, verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import same_bits
from secondcast.storage_schemas.writer import CacheWriter
from tests.storage_schemas.caches import data_files, some_arrays, some_manifest, some_prompts

FORMATS = ("zarr", "webdataset")
PROMPTS, SHARD_SIZE = 18, 3
PATIENCE_SECONDS = 120.0
_PRELOAD = [
    "secondcast.storage_schemas.writer",
    "secondcast.storage_schemas.formats.zarr",
    "webdataset",
    "tests.storage_schemas.caches",
]
_PRELOAD_POCKET = [
    "cli",
    "secondcast.api.terminal",
    "secondcast.cache_builder.build",
    "transformers.models.t5.modeling_t5",
    "diffusers",
]
Target = Callable[..., None]


@dataclass
class Tally:
    """What happened in one row of the table. `faults`: what must not be."""

    builder: str
    kills: int = 0
    before_manifest: int = 0
    in_a_write: int = 0
    before_a_record: int = 0
    with_two: int = 0
    taken: int = 0
    shards_checked: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """As markdown."""
        cells = [self.kills, self.before_manifest, self.in_a_write, self.before_a_record, self.with_two, self.taken]
        cells += [self.shards_checked, self.finished, len(self.faults)]
        return f"| {self.builder} | {' | '.join(map(str, cells))} |"


HEADER = (
    "| builder | kills | before the manifest | within a write | data without its record | beside a second builder | "
    "ShardLockedError | shards checked | builds ended, same bytes | faults |\n|---|---|---|---|---|---|---|---|---|---|"
)


def write_slowly(folder: Path, form: str, seed: int, longest_seconds: float, log: Path) -> None:
    """Build a cache of made-up numbers, with a random wait before each step that reaches the disk."""
    rng = random.Random(seed)
    if longest_seconds:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
            setattr(owner, name, _after_a_wait(getattr(owner, name), rng, longest_seconds))
    prompts = some_prompts(PROMPTS)
    manifest: Any = some_manifest(prompts, format=form, compression="lossless", shard_size=SHARD_SIZE)
    writer = CacheWriter.create_or_resume(folder, manifest, prompts, {})
    for kind in ("embeddings", "trajectories"):
        for shard in writer.missing(kind):
            try:
                arrays = some_arrays(writer.manifest, shard, kind)
                writer.commit(kind, shard, arrays, seconds=0.0, provenance={"process": os.getpid()})
            except ShardLockedError:
                with log.open("a") as file:
                    file.write("taken\n")
    assert writer.finish()


def _after_a_wait(work: Callable[..., Any], rng: random.Random, longest_seconds: float) -> Callable[..., Any]:
    def waiting(*values: Any, **named: Any) -> Any:
        time.sleep(rng.random() * longest_seconds)
        return work(*values, **named)

    return waiting


def build_pocket(folder: Path, form: str, seed: int, longest_seconds: float, log: Path) -> None:
    """The real command; killed where it is."""
    from secondcast.cli import main

    prompts = log.with_suffix(".txt")
    sys.argv = ["secondcast", "build", str(folder), "--teacher", "pocket", "--prompts", str(prompts), "--quiet"]
    sys.argv += ["--steps", "8", "--shard-size", "2", "--batch-size", "2", "--format", form, "--device", "cpu"]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  # for as long as the process lives
    main()


class Rounds:
    """Builds in processes of their own, killed until there were `kills`."""

    def __init__(self, target: Target, form: str, folder: Path, seed: int, tally: Tally, longest: float) -> None:
        self.target, self.form, self.folder, self.tally, self.longest = target, form, folder, tally, longest
        self.rng = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*_PRELOAD, *(_PRELOAD_POCKET if target is build_pocket else [])])
        self.log = folder / "taken"
        self.log.with_suffix(".txt").write_text("".join(f"a red circle and {i} signs\n" for i in range(PROMPTS)))
        self.log.touch()

    def run(self, kills: int, *, pairs: float, moments: tuple[float, float] = (0.0, 0.7)) -> Tally:
        """Kill until it was enough; `pairs`: share of rounds with two builders on one cache.

        `moments`: first and last moment of a kill, as shares of the time of an uninterrupted build.
        """
        self.moments = moments
        self._start("truth", waits=0.0).join(PATIENCE_SECONDS)  # warms the machine up too
        started = time.monotonic()
        self._start("timed", waits=self.longest).join(PATIENCE_SECONDS)
        self.window = time.monotonic() - started
        self.truth, self.files = Cache.open(self.folder / "truth"), data_files(self.folder / "truth")
        number = 0
        while self.tally.kills < kills:
            self._one_cache(f"{number:04d}", kills, pairs)
            number += 1
        self.tally.taken = len(self.log.read_text().splitlines())
        return self.tally

    def _start(self, name: str, *, waits: float) -> BaseProcess:
        arguments = (self.folder / name, self.form, self.rng.randrange(2**32), waits, self.log)
        process = self.context.Process(target=self.target, args=arguments)
        process.start()
        return process

    def _one_cache(self, name: str, kills: int, pairs: float) -> None:
        """Kill and go on until a build of this cache comes to its end."""
        before: dict[str, bytes] = {}
        ended = False
        while not ended:
            two = self.rng.random() < pairs
            enough = self.tally.kills >= kills
            processes = [self._start(name, waits=self.longest) for _ in range(1 + two)]
            for process in processes:
                if not enough:
                    process.join(self.rng.uniform(*self.moments) * self.window)
                    ended |= self._kill(process, two)
                else:
                    process.join(PATIENCE_SECONDS)
                    ended |= process.exitcode == 0
                    if process.exitcode != 0:
                        self._fault(name, f"a builder ended with {process.exitcode}")
            before = self._check(name, before)
        found = data_files(self.folder / name)
        self._same(name, {path: data for path, data in found.items() if not path.endswith(".tmp")})
        # Of two builders the other may have been killed since: its temporary file goes when a build is given again.
        self._start(name, waits=0.0).join(PATIENCE_SECONDS)
        self._check(name, before)
        self._same(name, data_files(self.folder / name))
        self.tally.finished += 1

    def _same(self, name: str, found: dict[str, bytes]) -> None:
        for path in sorted(found.keys() | self.files.keys()):
            if found.get(path) != self.files.get(path):
                self._fault(name, f"{path} is not as an uninterrupted build has it")

    def _kill(self, process: BaseProcess, two: bool) -> bool:
        """Whether the process had come to its end before."""
        if process.exitcode is not None:
            if process.exitcode:
                self._fault("", f"a builder ended with {process.exitcode}")
            return process.exitcode == 0
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.tally.kills += 1
            self.tally.with_two += two
        return process.exitcode == 0

    def _fault(self, name: str, what: str) -> None:
        self.tally.faults.append(f"{self.tally.builder} {name}: {what}")

    def _check(self, name: str, before: dict[str, bytes]) -> dict[str, bytes]:
        """Compare all that is committed with the truth; the records that lie there now."""
        cache = self.folder / name
        records = {path.name: path.read_bytes() for path in cache.glob("commits/*-*.json")}
        named = set()
        for record, data in before.items():
            if records.get(record) != data:
                self._fault(name, f"{record} was lost or changed")
        for record, data in records.items():
            for file in json.loads(data)["files"]:
                named.add(file["path"])
                found = (cache / file["path"]).read_bytes() if (cache / file["path"]).exists() else b""
                if len(found) != file["bytes"] or xxhash.xxh3_128_hexdigest(found) != file["xxh3_128"]:
                    self._fault(name, f"{file['path']} is torn, and {record} vouches for it")
        self.tally.shards_checked += len(records)
        self._where(cache, named)
        if (cache / "manifest.json").exists():
            try:
                self._read(name, Cache.open(cache, verify="always"))
                for problem in verify(cache, Silent()).problems:
                    # Killed between the last record and the index: the next build, or `repair`, writes it.
                    if problem.path != INDEX_PATH or (cache / INDEX_PATH).exists():
                        self._fault(name, problem.message)
            except Exception as error:
                self._fault(name, f"{type(error).__name__}: {error}")
        elif records:
            self._fault(name, "has records and no manifest")
        return records

    def _where(self, cache: Path, named: set[str]) -> None:
        """Count in which step of the protocol the kill landed."""
        files = [path for path in cache.rglob("*") if path.is_file()]
        data = {
            str(path.relative_to(cache)) for path in files if path.parts[len(cache.parts)].startswith(("tr", "emb"))
        }
        whole = {path for path in data if not path.endswith((".tmp", "zarr.json"))}
        self.tally.before_manifest += not (cache / "manifest.json").exists()
        self.tally.in_a_write += any(path.name.endswith(".tmp") for path in files)
        self.tally.before_a_record += bool(whole - named)

    def _read(self, name: str, cache: Cache) -> None:
        for index in map(int, cache.indices()):
            ours, true = cache.trajectory(index), self.truth.trajectory(index)
            pairs = ((getattr(ours, n), getattr(true, n)) for n in ("velocity_KSC", "hidden_states_KSC", "noise_SC"))
            if not all(same_bits(*pair) for pair in pairs) or (ours.key, ours.guidance) != (true.key, true.guidance):
                self._fault(name, f"trajectory {index} reads otherwise")
        for kind, number in cache.records:
            shard = cache.layout.embeddings[number] if kind == "embeddings" else None
            for prompt in range(shard.first, shard.first + shard.rows) if shard else ():
                if not same_bits(cache.embedding(prompt), self.truth.embedding(prompt)):
                    self._fault(name, f"embedding {prompt} reads otherwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of the fast builder, per format")
    parser.add_argument("--pocket-kills", type=int, default=12, help="of the real command, per format")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    faults: list[str] = []
    print(HEADER)
    # The real command loads the teacher for a good part of its time.
    for what, target, kills, longest, pairs, moments in (
        ("fast", write_slowly, given.kills, 0.004, 0.3, (0.0, 0.7)),
        ("pocket", build_pocket, given.pocket_kills, 0.0, 0.0, (0.3, 1.0)),
    ):
        for form in FORMATS:
            with tempfile.TemporaryDirectory() as name:
                tally = Tally(builder=f"{what}, {form}")
                Rounds(target, form, Path(name), given.seed, tally, longest).run(kills, pairs=pairs, moments=moments)
            print(tally.row(), flush=True)
            faults += tally.faults
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
