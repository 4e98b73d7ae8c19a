"""The weights of streamed blocks: a flat buffer of each on the host, and a ring of slots on the device.

The ring holds the current and the next blocks, in forward order in the forward pass and in reverse order in the
backward pass. Blocks that are still in the ring are not copied again. The weights do not change, so nothing is copied
back.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from secondcast.storage_schemas.errors import SettingsError

Pass = Literal["alone", "forward", "backward"]
"""alone: a forward pass without a backward pass."""

# Alignment of tensors in a buffer, as of torch's caching allocator, because it affects the choice of kernels.
_ALIGNMENT = 512
_PAGE = 4096
_PORTABLE = 1


class HostBlock:
    """The weights of a block in one flat buffer on the host, pinned if the device is a GPU.

    `flat` is uint8; between uses the block's tensors are views of it, so that the model is complete at any time.
    """

    def __init__(self, block: torch.nn.Module, device: torch.device) -> None:
        self.tensors = [*block.parameters(), *block.buffers()]
        self._offsets, end = [], 0
        for tensor in self.tensors:
            self._offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._shapes = [(tensor.dtype, tensor.shape) for tensor in self.tensors]
        self.flat = _pinned(end) if device.type == "cuda" else torch.empty(end, dtype=torch.uint8)
        for tensor, view in zip(self.tensors, self._views(self.flat), strict=True):
            view.copy_(tensor.detach())
        self.lies_in(self.flat)

    def lies_in(self, flat: torch.Tensor) -> None:
        """Point the block's tensors to the weights in `flat`: its buffer on the host, or a slot."""
        for tensor, view in zip(self.tensors, self._views(flat), strict=True):
            tensor.data = view

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        for offset, (dtype, shape) in zip(self._offsets, self._shapes, strict=True):
            part = flat[offset : offset + shape.numel() * dtype.itemsize]
            yield part.view(dtype).view(shape)


@dataclass
class Slot:
    """A flat buffer on the device, and the index of the streamed block in it.

    On a GPU `filled` is the event after the copy into it, `free` the event after the last kernel that reads it.
    """

    buffer: torch.Tensor
    holds: int | None = None
    filled: Any = None
    free: Any = None


class Transfers:
    """Copies from host to device: asynchronously on a separate CUDA stream; synchronously on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def new_slot(self, size_bytes: int) -> Slot:
        """An empty slot."""
        slot = Slot(torch.empty(size_bytes, dtype=torch.uint8, device=self.device))
        if self._stream is not None:
            slot.filled, slot.free = torch.cuda.Event(), torch.cuda.Event()
            # Kernels of its previous user may still read the memory; it is freed only after the copy stream is done.
            self.release(slot)
            slot.buffer.record_stream(self._stream)
        return slot

    def copy(self, slot: Slot, flat: torch.Tensor) -> None:
        """Queue a copy into a slot after the kernels that read it; the host does not wait."""
        if self._stream is None:
            slot.buffer[: len(flat)].copy_(flat)
            return
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            slot.buffer[: len(flat)].copy_(flat, non_blocking=True)
            slot.filled.record(self._stream)

    def acquire(self, slot: Slot) -> None:
        """Make work queued from now on wait until the slot is filled."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)

    def release(self, slot: Slot) -> None:
        """Make the next copy into the slot wait for work queued so far."""
        if self._stream is not None:
            slot.free.record(torch.cuda.current_stream(self.device))


class Ring:
    """Slots on the device for streamed blocks, filled in the order of computation."""

    def __init__(self, hosts: list[HostBlock], slots: int, device: torch.device) -> None:
        self.hosts, self.transfers, self._busy = hosts, Transfers(device), False
        size_bytes = max(len(host.flat) for host in hosts)
        self.slots = [self.transfers.new_slot(size_bytes) for _ in range(min(slots, len(hosts)))]

    @contextmanager
    def turn(self, block: int, of: Pass) -> Iterator[None]:
        """A context in which the weights of a streamed block are on the device; then its slot is reused."""
        assert not self._busy, "two streamed blocks compute at once"
        self._fill(self._wanted(block, of))
        slot = next(slot for slot in self.slots if slot.holds == block)
        self.transfers.acquire(slot)
        self.hosts[block].lies_in(slot.buffer)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self.hosts[block].lies_in(self.hosts[block].flat)
            self.transfers.release(slot)
        self._fill(self._wanted(block - 1 if of == "backward" else block + 1, of))

    def _wanted(self, first: int, of: Pass) -> list[int]:
        """The blocks that compute from `first` on, one per slot; fewer at the end of a pass."""
        window = range(len(self.slots))
        if of == "alone":
            return [(first + ahead) % len(self.hosts) for ahead in window]
        ahead_of = [first - ahead if of == "backward" else first + ahead for ahead in window]
        return [block for block in ahead_of if 0 <= block < len(self.hosts)]

    def _fill(self, wanted: list[int]) -> None:
        for block in wanted:
            if any(slot.holds == block for slot in self.slots):
                continue
            slot = next(slot for slot in self.slots if slot.holds not in wanted)
            slot.holds = block
            self.transfers.copy(slot, self.hosts[block].flat)


def _pinned(size_bytes: int) -> torch.Tensor:
    """Page-locked uint8 memory of this size. Not pin_memory=True: its allocator rounds up to a power of two."""
    runtime = torch.cuda.cudart()
    whole_bytes = -(-size_bytes // _PAGE) * _PAGE
    # Separate pages, because a page can only be registered once.
    memory = torch.empty(whole_bytes + _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    flat = memory[start : start + size_bytes]
    error = int(runtime.cudaHostRegister(flat.data_ptr(), whole_bytes, _PORTABLE))
    if error:
        raise SettingsError(
            f"{size_bytes / 2**30:.2f} GiB of host memory for a streamed block cannot be pinned (CUDA error {error}): "
            f"raise the limit of locked memory (ulimit -l), or --gpu-blocks"
        )
    weakref.finalize(flat, _unpin, runtime, flat.data_ptr()).atexit = False
    return flat


def _unpin(runtime: Any, address: int) -> None:
    # A copy from it may still be running.
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(address)
