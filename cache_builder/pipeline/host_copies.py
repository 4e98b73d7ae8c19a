"""Device-to-host copies that overlap with computation."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.tensors import from_torch


class HostCopies:
    """Copies tensors to host memory in a thread, on a separate stream; used as a context manager.

    Submitted tensors must not be modified. On a CPU nothing is copied: arrays share the tensors' memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="host-copy")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> Future[Arrays]:
        """Copy the bits of these tensors, after all work queued on the device so far."""
        if self._stream is None:
            done: Future[Arrays] = Future()
            done.set_result({name: from_torch(tensor) for name, tensor in tensors.items()})
            return done
        # Pass the device: the default is cuda:0, whose stream is not synchronised with the computation.
        computed = torch.cuda.current_stream(self._device).record_event()
        return self._executor.submit(self._copy, dict(tensors), computed)

    def _copy(self, tensors: dict[str, torch.Tensor], computed: torch.cuda.Event) -> Arrays:
        with torch.cuda.stream(self._stream):
            computed.wait(self._stream)
            # Returns when the copy is done, so that the main stream reuses the tensors' memory only then.
            return {name: from_torch(tensor) for name, tensor in tensors.items()}
