"""The process of encoding.py: encodes and checks shards of the given cache until stdin ends."""

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

from secondcast.storage_schemas.errors import SecondcastError
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.reader import prompt_table, read_manifest
from secondcast.storage_schemas.schema.fields import DTYPES, Arrays
from secondcast.storage_schemas.writer import CacheWriter


def main(location: str) -> None:
    """Answer requests in order."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Output printed by libraries must not reach the pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    writer: CacheWriter | None = None
    while line := requests.readline():
        request = json.loads(line)
        arrays = {name: _array(requests, dtype, shape) for name, dtype, shape in request["fields"]}
        try:
            writer = writer or _writer(location)
            files = _encode(writer, request, arrays)
        except SecondcastError as error:
            _send(answers, {"error": type(error).__name__, "message": str(error)}, {})
            continue
        _send(answers, {"files": [[path, len(data)] for path, data in files.items()]}, files)


def _writer(location: str) -> CacheWriter:
    folder = open_folder(location)
    manifest = read_manifest(folder)
    return CacheWriter(folder, manifest, list(prompt_table(folder, manifest, verify="once")))


def _encode(writer: CacheWriter, request: dict[str, Any], arrays: Arrays) -> dict[str, bytes]:
    layout = writer.layout
    shards = layout.embeddings if request["kind"] == "embeddings" else layout.trajectories
    return writer.encode(request["kind"], shards[request["shard"]], arrays)


def _array(stream: BinaryIO, dtype_name: str, shape: list[int]) -> np.ndarray:
    dtype = DTYPES[dtype_name]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = stream.read(size)
    if len(data) != size:
        sys.exit(1)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _send(answers: BinaryIO, header: dict[str, Any], files: dict[str, bytes]) -> None:
    answers.write((json.dumps(header) + "\n").encode())
    for data in files.values():
        answers.write(data)
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
