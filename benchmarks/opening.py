"""What opening a finished cache of many trajectories costs: seconds, memory, requests.

python -m benchmarks.opening [--num-trajectories 1000000] [--s3]
Everything but the shards is written by the real encoders; of the shards, only the first ones exist.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from secondcast.storage_schemas.formats.by_manifest import format_of
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Location, open_folder
from secondcast.storage_schemas.schema.commits import (
    INDEX_FILE,
    KINDS,
    CommitRecord,
    FileRecord,
    Kind,
    Records,
    encode_index,
)
from secondcast.storage_schemas.schema.fields import fields_of
from secondcast.storage_schemas.schema.layout import Layout, ShardRange
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.schema.prompts import Prompt, encode_prompts, prompt_id
from tests.storage_schemas.caches import some_arrays, some_manifest

SHARD_SIZE = 64
PROVENANCE = {
    "versions": {"torch": "2.13.0", "diffusers": "0.39.0", "transformers": "5.23.0", "zarr": "3.1.6"},
    "device": "NVIDIA H100 80GB HBM3",
    "batch_size": 16,
    "threads": 16,
}
MEASURE = """
import json, sys, time
from pathlib import Path
begun = time.perf_counter()
from secondcast.storage_schemas.reader import Cache
imported = time.perf_counter()
cache = Cache.open(sys.argv[1])
opened = time.perf_counter()
found = {"import_seconds": imported - begun, "open_seconds": opened - imported, "trajectories": len(cache)}
if sys.argv[2] == "first":
    cache.trajectory(1)
    first = time.perf_counter()
    cache.trajectory(1)
    found = {"first_record_seconds": first - opened, "record_again_seconds": time.perf_counter() - first}
# Not getrusage: its peak begins with that of the process that started this one.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps(found | {"peak_mib": int(peak.split()[1]) / 1024}))
"""
STAGES = ("open", "first")


def made_up_prompts(count: int) -> list[Prompt]:
    texts = [f"a picture of {i} things on a table beside a window in the evening light" for i in range(count)]
    ids = tuple(range(3, 22))
    return [Prompt(id=prompt_id(text), text=text, sources=("made-up",), token_ids=(i % 999, *ids, 1))
            for i, text in enumerate(texts)]  # fmt: skip


def record_of(manifest: Manifest, kind: Kind, shard: ShardRange, files: dict[str, bytes]) -> CommitRecord:
    """A record with as many files, of as many letters, as the real one."""
    listed = tuple(FileRecord(path=path, bytes=len(data), xxh3_128=xxh3_128(data)) for path, data in files.items())
    if not files:
        zeros = "/0" * 3
        listed = tuple(
            FileRecord(
                path=f"{kind}.zarr/{field.name}/c/{shard.shard}{zeros[: 2 * len(field.row_shape)]}",
                bytes=field.row_bytes * SHARD_SIZE + 1028,
                xxh3_128=xxh3_128(f"{field.name} {shard.shard}".encode()),
            )
            for field in fields_of(manifest, kind)
        )
    return CommitRecord(
        kind=kind, shard=shard.shard, segment=0, rows=shard.rows, files=listed, provenance=PROVENANCE,
        content=xxh3_128(str(shard.first).encode()), raw_bytes=184_000_000 + shard.shard,
        seconds=40.125 + shard.shard % 7, finished_at="2026-11-21T04:00:00+00:00",
    )  # fmt: skip


def files_of(trajectories: int) -> dict[str, bytes]:
    """The files of a finished cache without most of its shards."""
    prompts = made_up_prompts(trajectories)
    manifest = some_manifest(prompts, shard_size=SHARD_SIZE)
    metadata = format_of(manifest).metadata()
    manifest = manifest.model_copy(update={"metadata": {name: xxh3_128(data) for name, data in metadata.items()}})
    lines, offsets = encode_prompts(prompts)
    files = {"prompts.jsonl": lines, "prompts.offsets": offsets, **metadata, MANIFEST_FILE: manifest.encode()}
    layout = Layout(manifest.prompts.segments)
    records = []
    for kind in KINDS:
        for shard in layout.trajectories if kind == "trajectories" else layout.embeddings:
            made = {} if shard.shard else format_of(manifest).encode(
                kind, 0, some_arrays(manifest, shard, kind), [{} for _ in range(shard.rows)]
            )  # fmt: skip
            files |= made
            records.append(record_of(manifest, kind, shard, made))
    index = encode_index(Records(records))
    print(f"index {len(index) / 2**20:.1f} MiB, prompts {len(lines) / 2**20:.1f} MiB")
    return {**files, f"commits/{INDEX_FILE}": index}


def write(location: Location, files: dict[str, bytes]) -> None:
    folder = open_folder(location)
    for name, data in files.items():
        folder.replace(name, data)


def measure(location: str, stage: str) -> dict[str, float]:
    """Open it in a fresh process; in the stage `first`, read a record too."""
    done = subprocess.run([sys.executable, "-c", MEASURE, location, stage], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(title: str, rounds: list[dict[str, float]]) -> None:
    for name in rounds[0]:
        print(f"{title:>12} {name:>22} {np.median([found[name] for found in rounds]):12.3f}")


def measure_on_s3(files: dict[str, bytes], rounds: int) -> None:
    from tests.storage_schemas.io.s3_server import running_s3

    with running_s3() as s3:
        s3.fresh()
        os.environ.update(s3.environment)
        write(s3.url, files)
        for stage in STAGES:
            found = []
            for _ in range(rounds):
                s3.reset()
                found.append(measure(s3.url, stage) | {"requests": len(s3.proxy.requests)})
            show(f"s3 {stage}", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trajectories", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true", help="Also on an S3 server of this machine (moto), by requests.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        files = files_of(asked.num_trajectories)
        write(Path(folder), files)
        print(f"written in {time.monotonic() - begun:.0f} s")
        for stage in STAGES:
            show(f"local {stage}", [measure(folder, stage) for _ in range(asked.rounds)])
    if asked.s3:
        measure_on_s3(files, asked.rounds)


if __name__ == "__main__":
    main()
