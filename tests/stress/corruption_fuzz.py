"""Is damage ever silent? `taskset -c 3 python -m tests.stress.corruption_fuzz`.

A file of a small cache is changed in one of many ways; then all prompts, trajectories and embeddings are read, and the
cache is verified. The reader must give exactly the true records or an error of this program, `verify` must find a
problem; other records, another exception or a clean report are failures. Prints a markdown table.
"""

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.formats.files import Verify
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from tests.storage_schemas.caches import some_prompts, write_keyed_cache

CACHES = tuple(itertools.product(("zarr", "webdataset"), ("none", "lossless")))
PATIENCE_SECONDS = 30
Files = dict[str, bytes]
Changes = dict[str, bytes | None]
"""What a mutation leaves under a path; None where it deletes the file."""
Mutation = Callable[[random.Random, str, Files], Changes]


def flip_bit(rng: random.Random, path: str, files: Files) -> Changes:
    data = bytearray(files[path])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {path: bytes(data)}


def overwrite_bytes(rng: random.Random, path: str, files: Files) -> Changes:
    data = files[path]
    begin, count = rng.randrange(len(data)), rng.randint(1, 16)
    return {path: data[:begin] + rng.randbytes(min(count, len(data) - begin)) + data[begin + count :]}


def overwrite_digit(rng: random.Random, path: str, files: Files) -> Changes:
    """As likely as a flipped bit, and JSON stays JSON."""
    data = bytearray(files[path])
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()] or [0]
    data[rng.choice(digits)] = ord(rng.choice('0123456789 -eE.[]{}"\n'))
    return {path: bytes(data)}


def cut(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: files[path][: rng.randrange(len(files[path]))]}


def empty(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: b""}


def delete(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: None}


def append(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: files[path] + rng.choice((b"\0", b"\n", b" ", rng.randbytes(64), files[path]))}


def insert(rng: random.Random, path: str, files: Files) -> Changes:
    begin = rng.randrange(len(files[path]))
    return {path: files[path][:begin] + rng.randbytes(rng.randint(1, 8)) + files[path][begin:]}


def take_out(rng: random.Random, path: str, files: Files) -> Changes:
    begin = rng.randrange(len(files[path]))
    return {path: files[path][:begin] + files[path][begin + rng.randint(1, 8) :]}


def zero_block(rng: random.Random, path: str, files: Files) -> Changes:
    data = files[path]
    size = min(len(data), rng.choice((4, 64, 512, 4096)))
    begin = rng.randrange(len(data) - size + 1)
    return {path: data[:begin] + bytes(size) + data[begin + size :]}


def swap(rng: random.Random, path: str, files: Files) -> Changes:
    other = _another(rng, path, files)
    return {path: files[other], other: files[path]}


def duplicate(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: files[_another(rng, path, files)]}


def rename(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: None, _another(rng, path, files): files[path]}


def other_json(rng: random.Random, path: str, files: Files) -> Changes:
    return {path: rng.choice((b"[1]", b"7", b"null", b'"x"', b"{}", b"[" * 10**5, b'{"a": NaN}', b'{"a": "\\ud800"}'))}


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit, overwrite_bytes, overwrite_digit, cut, empty, delete, append, insert, take_out, zero_block, swap,
    duplicate, rename, other_json,
)  # fmt: skip


def kind_of(path: str) -> str:
    """The kind of a file of a cache, as the table names it."""
    name = path.rsplit("/", 1)[-1]
    if "/" not in path or name in ("index.json", "zarr.json"):
        return name
    if path.startswith("commits/"):
        return "commit record"
    if name.endswith(".index.json"):
        return "byte index of a tar"
    return {"tar": "tar", "model": "tokenizer file"}.get(name.rsplit(".", 1)[-1], f"shard of {path.split('/')[1]}")


def _another(rng: random.Random, path: str, files: Files) -> str:
    """Another file of the same kind; any other where there is none."""
    same = [name for name in files if kind_of(name) == kind_of(path) and name != path]
    return rng.choice(same or [name for name in files if name != path])


def everything(folder: Path, mode: Verify) -> list[Any]:
    """All that a reader can ask a cache for."""
    cache = Cache.open(folder, verify=mode)
    records: list[Any] = [cache.planned, len(cache), sorted(cache.tokenizer_files.items())]
    for number, prompt in enumerate(cache.prompts):
        embedding = cache.embedding(number)
        records.append((prompt, cache.prompts[number], cache.padded_token_ids(number).tobytes(), embedding.tobytes()))
    for index in range(cache.planned):
        t = cache.trajectory(index)
        arrays = (t.noise_SC, t.velocity_KSC, t.final_latent_SC, t.hidden_states_KSC)
        labels = (t.key, t.prompt, t.sample_index, t.guidance, cache.guidance(index), t.sigmas)
        records.append((labels, [(str(a.dtype), a.shape, a.tobytes()) for a in arrays]))
    return records


def reading(folder: Path, truth: list[Any], mode: Verify) -> str:
    """What a reader meets: "true", "error", "other records", or the name of another exception."""
    try:
        return "true" if everything(folder, mode) == truth else "other records"
    except SecondcastError as error:
        return "error" if "\n" not in str(error) else "error of several lines"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def verifying(folder: Path) -> str:
    """What `verify` says: "found", "clean", or the name of another exception."""
    try:
        return "found" if verify(folder, Silent()).problems else "clean"
    except SecondcastError:
        return "found"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Target:
    """A whole cache in a folder, damaged and put right again."""

    def __init__(self, folder: Path, form: str, compression: str) -> None:
        self.folder, self.name = folder, f"{form}, {compression}"
        write_keyed_cache(folder, some_prompts(6), format=form, compression=compression, shard_size=3)
        paths = (path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.truth = everything(folder, "once")
        assert verifying(folder) == "clean"

    def mutants(self, rng: random.Random) -> Iterator[tuple[str, str, Changes]]:
        """Kind of file, mutation and changes: every mutation of every kind of file in turn, without end."""
        by_kind: dict[str, list[str]] = defaultdict(list)
        for path in self.files:
            by_kind[kind_of(path)].append(path)
        while True:
            for kind, mutation in itertools.product(by_kind, MUTATIONS):
                changes = mutation(rng, rng.choice(by_kind[kind]), self.files)
                if any(self.files[path] != data for path, data in changes.items()):
                    yield kind, mutation.__name__, changes

    def put(self, changes: Changes) -> None:
        """Write what is given, delete what is None."""
        for path, data in changes.items():
            if data is None:
                (self.folder / path).unlink()
            else:
                (self.folder / path).write_bytes(data)

    def try_one(self, changes: Changes) -> tuple[str, str, str]:
        """What the reader meets with --verify-checksums once, with off, and what `verify` says."""
        self.put(changes)
        try:
            once, off = (reading(self.folder, self.truth, mode) for mode in ("once", "off"))
            return once, off, verifying(self.folder)
        finally:
            self.put({path: self.files[path] for path in changes})


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"longer than {PATIENCE_SECONDS} seconds")


class Table:
    """Counts per kind of file, and what must not be."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[str] = []

    def add(self, where: str, kind: str, once: str, off: str, verdict: str) -> None:
        """Count one mutation of a file of this kind: what `Target.try_one` gave."""
        row = self.counts[kind]
        row["mutations"] += 1
        row[{"true": "true", "error": "refused", "other records": "silent"}.get(once, "traceback")] += 1
        row[{"true": "off true", "error": "off refused", "other records": "off silent"}.get(off, "off traceback")] += 1
        row["found"] += verdict == "found"
        row["traceback"] += verdict not in ("found", "clean")
        if once not in ("true", "error") or verdict != "found":
            self.failures.append(f"{where}: reader: {once}; verify: {verdict}")
        elif off not in ("true", "error", "other records"):
            self.failures.append(f"{where}: reader with --verify-checksums off: {off}")

    def text(self) -> str:
        """As markdown."""
        names = ["mutations", "refused", "true", "silent", "traceback", "found"]
        names += ["off refused", "off true", "off silent", "off traceback"]
        rows = [
            "| file | mutations | refused | true records | other records | tracebacks | found by verify "
            "| off: refused | off: true | off: other | off: tracebacks |",
            f"|{'---|' * (len(names) + 1)}",
        ]
        everywhere: Counter[str] = sum(self.counts.values(), Counter())
        for kind, row in [*sorted(self.counts.items()), ("all", everywhere)]:
            rows.append(f"| {kind} | {' | '.join(str(row[name]) for name in names)} |")
        return "\n".join(rows)


def run(folder: Path, count: int, seed: int) -> Table:
    """So many mutations, the same number of each format and codec."""
    table, rng = Table(), random.Random(seed)
    signal.signal(signal.SIGALRM, _too_long)
    for form, compression in CACHES:
        target = Target(folder / f"{form}-{compression}", form, compression)
        for kind, mutation, changes in itertools.islice(target.mutants(rng), count // len(CACHES)):
            signal.alarm(PATIENCE_SECONDS)
            outcome = target.try_one(changes)
            signal.alarm(0)
            table.add(f"{target.name}: {mutation} of {', '.join(changes)}", kind, *outcome)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2800)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        table = run(Path(name), given.count, given.seed)
    print(f"{table.text()}\n\n{time.monotonic() - started:.0f} seconds")
    print("\n".join(table.failures))
    sys.exit(bool(table.failures))


if __name__ == "__main__":
    main()
