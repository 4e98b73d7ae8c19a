"""Train and sample through a frozen transformer that does not fit on the GPU, by streaming exact weights of its blocks.

The weights do not change, so nothing is copied back. A streamed block has a flat pinned buffer on the host. A ring of
slots on the device holds the current and the next blocks, in forward order in the forward pass and in reverse order in
the backward pass, where each block recomputes its forward pass. Blocks that are still in the ring are not copied again.
Based on the idea of musubi-tuner's host-to-device block swap (Apache-2.0), without its code.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch

from secondcast.models.families.anatomy import Anatomy
from secondcast.models.families.registry import anatomy_of
from secondcast.models.memory.blocks import SLOTS, streamed_blocks
from secondcast.models.memory.modulation_table import check_modulation
from secondcast.models.memory.options import MemoryOptions
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
        self._tensors = [*block.parameters(), *block.buffers()]
        self._offsets, end = [], 0
        for tensor in self._tensors:
            self._offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._shapes = [(tensor.dtype, tensor.shape) for tensor in self._tensors]
        self.flat = _pinned(end) if device.type == "cuda" else torch.empty(end, dtype=torch.uint8)
        for tensor, view in zip(self._tensors, self._views(self.flat), strict=True):
            view.copy_(tensor.detach())
        self.lies_in(self.flat)

    def lies_in(self, flat: torch.Tensor) -> None:
        """Point the block's tensors to the weights in `flat`: its buffer on the host, or a slot."""
        for tensor, view in zip(self._tensors, self._views(flat), strict=True):
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


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """The result of `stream_blocks`. `ring` is None if every block is resident."""

    transformer: Any
    hosts: list[HostBlock] = field(repr=False)
    ring: Ring | None = field(repr=False)

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        return sum(len(host.flat) for host in self.hosts)

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on the device, including the ring."""
        streamed = {id(tensor) for host in self.hosts for tensor in host._tensors}
        model = self.transformer
        there = (t.nbytes for t in chain(model.parameters(), model.buffers()) if id(t) not in streamed)
        return sum(there) + (sum(slot.buffer.nbytes for slot in self.ring.slots) if self.ring else 0)


def stream_blocks(
    transformer: Any,
    *,
    device: torch.device,
    resident: int,
    slots: int = SLOTS,
    checkpoint_resident: bool = True,
) -> Streaming:
    """Prepare a frozen transformer on the CPU, in place: `resident` blocks and all other modules move to `device`.

    slots: buffers on the device for streamed blocks; with 2, one is filled while the other computes.
    checkpoint_resident: whether resident blocks are checkpointed, as the streamed ones always are.

    Outputs and gradients are those of the original model, bit for bit (where text enters every block its gradient is
    summed in another order, see Anatomy.cross_attention); gradients only flow to the inputs. `state_dict`
    still works, but `.to()` would undo the streaming. Call this after everything that changes modules or their forwards
    (set a compiled forward as block.forward; block.compile() would compile the wrapper of this function), and do not
    use autocast. Raises SettingsError.
    """
    blocks = anatomy_of(transformer).blocks(transformer)
    check_resident(resident, len(blocks))
    if slots < 1:
        raise SettingsError(f"slots is {slots}, expected at least 1: a streamed block computes in a slot; use 2")
    transformer.eval().requires_grad_(False)
    # Blocks are recomputed by _Recomputing instead.
    transformer.disable_gradient_checkpointing()
    streamed = streamed_blocks(resident, len(blocks))
    hosts = [HostBlock(blocks[index], device) for index in streamed]
    for module in _all_but(transformer, [blocks[index] for index in streamed]):
        module.to(device)
    for tensor in chain(transformer.parameters(recurse=False), transformer.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)
    ring = Ring(hosts, slots, device) if hosts else None
    place = {index: turn for turn, index in enumerate(streamed)}
    for index, block in enumerate(blocks):
        turn = partial(ring.turn, place[index]) if ring is not None and index in place else None
        if turn is not None or checkpoint_resident:
            block.forward = _Recomputing(block.forward, turn)
    return Streaming(transformer=transformer, hosts=hosts, ring=ring)


_Outputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of a call of a block, without its tensors, which autograd has to see.

    others: all arguments in order, None in place of a tensor. names: of those that were given by name, the last ones.
    """

    others: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple["_Call", list[torch.Tensor]]:
        """A call, and its tensors."""
        values = (*given, *named.values())
        is_tensor = tuple(isinstance(value, torch.Tensor) for value in values)
        others = tuple(None if found else value for value, found in zip(values, is_tensor, strict=True))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return cls(others=others, is_tensor=is_tensor, names=tuple(named)), tensors

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with these tensors, by position and by name."""
        left = iter(tensors)
        values = [next(left) if found else other for found, other in zip(self.is_tensor, self.others, strict=True)]
        positional = len(values) - len(self.names)
        return values[:positional], dict(zip(self.names, values[positional:], strict=True))


class _Recomputing:
    """The forward of a block with its weights on the device, recomputed in the backward pass."""

    def __init__(self, forward: Callable[..., _Outputs], turn: Callable[[Pass], Any] | None) -> None:
        self._forward, self._turn = forward, turn or _resident_turn

    def __call__(self, *given: Any, **named: Any) -> _Outputs:
        call, tensors = _Call.of(given, named)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            outputs: _Outputs = _Block.apply(self, call, *tensors)  # type: ignore[no-untyped-call]
            return outputs
        return self.run("alone", tensors, call)

    def run(self, of: Pass, tensors: Sequence[torch.Tensor], call: _Call) -> _Outputs:
        """One forward pass."""
        given, named = call.arguments(tensors)
        with self._turn(of):
            return self._forward(*given, **named)

    def gradients(
        self, inputs: list[torch.Tensor], call: _Call, gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Gradients of the inputs that require one, from those of the outputs; None for the others."""
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        given, named = call.arguments(inputs)
        # The backward pass of a linear reads its weight, so it must be within the turn.
        with self._turn("backward"), torch.enable_grad():
            found = self._forward(*given, **named)
            outputs = (found,) if isinstance(found, torch.Tensor) else found
            reached = [place for place, gradient in enumerate(gradients) if gradient is not None]
            left = iter(
                torch.autograd.grad(
                    [outputs[place] for place in reached],
                    wanted,
                    [gradients[place] for place in reached],
                    allow_unused=True,
                )
            )
        return [next(left) if tensor.requires_grad else None for tensor in inputs]


@contextmanager
def _resident_turn(of: Pass) -> Iterator[None]:
    yield


class _Block(torch.autograd.Function):
    """A block that only saves its inputs."""

    @staticmethod
    def forward(ctx: Any, block: _Recomputing, call: _Call, *tensors: torch.Tensor) -> Any:
        ctx.block, ctx.call = block, call
        ctx.save_for_backward(*tensors)
        # Avoids computing with zeros in place of missing gradients.
        ctx.set_materialize_grads(False)
        return block.run("forward", tensors, call)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        return None, None, *ctx.block.gradients(inputs, ctx.call, gradients)


def _all_but(transformer: torch.nn.Module, streamed: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for child in transformer.children():
        parts = child if isinstance(child, torch.nn.ModuleList) else [child]
        yield from (part for part in parts if not any(part is block for block in streamed))


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


def check_placement(options: MemoryOptions, anatomy: Anatomy, config: Mapping[str, Any]) -> None:
    """Raise SettingsError if a transformer with this configuration lacks the weights or blocks that are placed."""
    check_modulation(options, anatomy)
    if options.gpu_blocks is not None:
        check_resident(options.gpu_blocks, anatomy.block_count(config))


def check_resident(resident: int, blocks: int) -> None:
    """Raise SettingsError unless `resident` is 0 to `blocks`."""
    if not 0 <= resident <= blocks:
        raise SettingsError(
            f"--gpu-blocks is {resident}, expected 0 to {blocks}, the number of loaded blocks of this transformer: use "
            f"{min(max(resident, 0), blocks)}"
        )
