"""Encodes and checks shards in a separate process, so that the sampler does not share its interpreter lock.

Pipes carry a line of JSON and raw bytes: arrays to the process, files back. The process is encoding_process.py.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from secondcast.storage_schemas import errors
from secondcast.storage_schemas.errors import SecondcastError, WorkerFailedError
from secondcast.storage_schemas.io.folders import location_of
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter

WORTH_BYTES = 64 * 2**20
"""Raw bytes from which the process is worthwhile: it takes about a second of a core to start."""


class EncodingProcess:
    """Encodes shards of a writer's cache; used as a context manager, from one thread."""

    def __init__(self, writer: CacheWriter) -> None:
        self._process = subprocess.Popen(
            # -P: do not import a folder `storage_schemas` in the working directory.
            [
                sys.executable,
                "-P",
                "-m",
                "secondcast.cache_builder.pipeline.encoding_process",
                location_of(writer.folder),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is handled by the sampler, which commits submitted shards first.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stdin, stdout = self._pipes
        with suppress(OSError):
            stdin.close()
        self._process.wait()
        stdout.close()

    @property
    def _pipes(self) -> tuple[Any, Any]:
        return self._process.stdin, self._process.stdout

    def encode(self, kind: Kind, shard: ShardRange, arrays: Arrays) -> dict[str, bytes]:
        """See CacheWriter.encode, whose errors it raises; WorkerFailedError if the process has died."""
        stdin, stdout = self._pipes
        fields = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
        try:
            stdin.write((json.dumps({"kind": kind, "shard": shard.shard, "fields": fields}) + "\n").encode())
            for array in arrays.values():
                stdin.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            stdin.flush()
            answer = json.loads(stdout.readline())
            if "error" in answer:
                raise _error(answer)
            return {path: _exactly(stdout, size) for path, size in answer["files"]}
        except (OSError, ValueError) as error:
            raise WorkerFailedError(
                f"the process that encodes shards ended with exit code {self._process.wait()} (out of host memory?): "
                f"committed shards are kept; rerun the same command"
            ) from error


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes, expected {size}")
    return data


def _error(answer: dict[str, str]) -> SecondcastError:
    kind: type[SecondcastError] = getattr(errors, answer["error"], SecondcastError)
    return kind(answer["message"])
