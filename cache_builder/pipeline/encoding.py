"""Encoding and checking shards in a process of its own: the interpreter's lock is the sampler's alone.

Over pipes go a line of JSON and raw bytes: arrays there, files back. The process is encoding_process.py.
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

WORTH_BYTES = 16 * 2**20
"""Raw bytes from which a process pays: it takes about a second of a core to start."""


class EncodingProcess:
    """Encodes shards of a writer's cache; used as a context manager, from one thread."""

    def __init__(self, writer: CacheWriter) -> None:
        self._process = subprocess.Popen(
            # -P: a folder `storage_schemas` where the command is given is not ours.
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
            # Ctrl-C is for the sampler, which has what is in hand committed first.
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
        """See CacheWriter.encode, of which it raises the errors; WorkerFailedError where the process is gone."""
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
                f"what was committed stays; give the same command again"
            ) from error


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes, expected {size}")
    return data


def _error(answer: dict[str, str]) -> SecondcastError:
    kind: type[SecondcastError] = getattr(errors, answer["error"], SecondcastError)
    return kind(answer["message"])
