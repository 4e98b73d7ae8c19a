"""Device memory and synchronisations of a simulated run, from the operations that it dispatches."""

import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.simulated_cuda.device.allocator import CachingAllocator, rounded

aten = torch.ops.aten
ROOT = Path(__file__).parents[3]
# FlashAttention's tiles of queries.
_TILE = 128
_FLOAT32 = 4


class DeviceMemory:
    """Storages of device tensors in a caching allocator, while they are alive."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self._known: set[int] = set()

    def follow(self, tensor: torch.Tensor) -> None:
        """Allocate the storage of a tensor that an operation returned, unless it is there already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        block = self.allocator.allocate(storage.nbytes())
        weakref.finalize(storage, self._forget, key, block).atexit = False

    def workspace(self, func: Any, args: tuple[Any, ...]) -> None:
        """Memory that a kernel only has while it runs."""
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            # FlashAttention 2: gradients of the queries, and a value for each of them, in float32.
            batch, heads, length, width = args[1].shape
            values = batch * heads * rounded(length, _TILE) * (width + 1)
            self.allocator.release(self.allocator.allocate(_FLOAT32 * values))

    def _forget(self, key: int, block: Any) -> None:
        self._known.discard(key)
        self.allocator.release(block)


class PinnedMemory:
    """Address ranges of page-locked host memory."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def register(self, address: int, size: int) -> None:
        """Lock a range."""
        self._sizes[address] = size

    def unregister(self, address: int) -> None:
        """Unlock a range."""
        self._sizes.pop(address, None)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is within a locked range."""
        if isinstance(tensor, FakeTensor):
            return False
        first = tensor.data_ptr()
        return any(address <= first < address + size for address, size in list(self._sizes.items()))


class Queue:
    """The work of the device that the host has not waited for, and the places where the host waits."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._queued = False
        self.waited = 0

    def launch(self) -> None:
        """Queue work."""
        self._queued = True

    def wait(self, why: str) -> None:
        """Wait for all work. Reading another value when nothing was queued since does not wait."""
        if self._queued:
            self.waits[f"{why} at {_place()}"] += 1
        self._queued = False
        self.waited += 1


def _place() -> str:
    """The innermost line of the product."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not {".venv", "simulated_cuda"} & {*file.relative_to(ROOT).parts}:
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "the simulation"
