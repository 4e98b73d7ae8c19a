"""Train through a frozen transformer that does not fit: exact weights of its blocks come from host memory in turn.

Nothing goes back, for nothing of them changes. A streamed block has a flat pinned buffer on the host; a ring of slots
on the device holds the blocks whose turn it is or will be next, forwards in the forward pass and backwards in the
backward pass, where a block computes its forward pass again. What the ring holds at the turn is not copied once more.
Source of the plan: the host-to-device block swap of musubi-tuner (Apache-2.0); no code of it is here.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel

from secondcast.storage_schemas.errors import SettingsError

Pass = Literal["alone", "forward", "backward"]
"""alone: a forward pass that no backward pass follows."""

# Of an address within a buffer: kernels choose by it, and the caching allocator's addresses have it too.
_ALIGNMENT = 512
_PAGE = 4096
SLOTS = 2
_PORTABLE = 1


class HostBlock:
    """The weights of a block in one flat buffer on the host, pinned if the device is a GPU.

    `flat` is uint8; between its turns the block's tensors are views of it, so that the model is whole at any time.
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
        """Have the block compute with the weights in `flat`: its buffer on the host, or a slot that holds it."""
        for tensor, view in zip(self._tensors, self._views(flat), strict=True):
            tensor.data = view

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        for offset, (dtype, shape) in zip(self._offsets, self._shapes, strict=True):
            part = flat[offset : offset + shape.numel() * dtype.itemsize]
            yield part.view(dtype).view(shape)


@dataclass
class Slot:
    """A flat buffer on the device, and which streamed block it holds.

    On a GPU: `filled` follows the copy into it, `free` the last kernel that reads it.
    """

    buffer: torch.Tensor
    holds: int | None = None
    filled: Any = None
    free: Any = None


class Transfers:
    """Copies from host to device beside the computation: on a CUDA stream of their own; elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def new_slot(self, size_bytes: int) -> Slot:
        """A slot that holds nothing."""
        slot = Slot(torch.empty(size_bytes, dtype=torch.uint8, device=self.device))
        if self._stream is not None:
            slot.filled, slot.free = torch.cuda.Event(), torch.cuda.Event()
            # The memory may still be read by kernels of whoever had it before, and is the stream's until it is done.
            self.release(slot)
            slot.buffer.record_stream(self._stream)
        return slot

    def copy(self, slot: Slot, flat: torch.Tensor) -> None:
        """Fill a slot as soon as the kernels that read it are done; the host does not wait."""
        if self._stream is None:
            slot.buffer[: len(flat)].copy_(flat)
            return
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            slot.buffer[: len(flat)].copy_(flat, non_blocking=True)
            slot.filled.record(self._stream)

    def acquire(self, slot: Slot) -> None:
        """Have what is queued from now on wait until the slot is filled."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)

    def release(self, slot: Slot) -> None:
        """Have the next copy into the slot wait for what is queued up to now."""
        if self._stream is not None:
            slot.free.record(torch.cuda.current_stream(self.device))


class Ring:
    """Slots on the device through which the streamed blocks pass, in the order in which they compute."""

    def __init__(self, hosts: list[HostBlock], slots: int, device: torch.device) -> None:
        self.hosts, self.transfers, self._busy = hosts, Transfers(device), False
        size_bytes = max(len(host.flat) for host in hosts)
        self.slots = [self.transfers.new_slot(size_bytes) for _ in range(min(slots, len(hosts)))]

    @contextmanager
    def turn(self, block: int, of: Pass) -> Iterator[None]:
        """The weights of a streamed block are on the device within; then the slot goes to the next one."""
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
        """The blocks that compute from `first` on, as many as there are slots; at the turn fewer."""
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
    """What `stream_blocks` made of a transformer. `ring` is None where every block is resident."""

    transformer: FluxTransformer2DModel
    hosts: list[HostBlock] = field(repr=False)
    ring: Ring | None = field(repr=False)

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        return sum(len(host.flat) for host in self.hosts)

    @property
    def device_bytes(self) -> int:
        """Weights on the device, the ring among them."""
        streamed = {id(tensor) for host in self.hosts for tensor in host._tensors}
        model = self.transformer
        there = (t.nbytes for t in chain(model.parameters(), model.buffers()) if id(t) not in streamed)
        return sum(there) + (sum(slot.buffer.nbytes for slot in self.ring.slots) if self.ring else 0)


def streamed_blocks(resident: int, total: int) -> list[int]:
    """Which of `total` blocks are streamed where so many are resident: spread evenly, so that copies have time."""
    count = total - resident
    return [index for index in range(total) if (index + 1) * count // total > index * count // total]


def stream_blocks(
    transformer: FluxTransformer2DModel,
    *,
    device: torch.device,
    resident: int,
    slots: int = SLOTS,
    checkpoint_resident: bool = True,
) -> Streaming:
    """Prepare a frozen transformer, loaded on the CPU, in place: `resident` blocks and what is no block go to `device`.

    slots: blocks of weights on the device beside the resident ones; 2 copy one while another computes.
    checkpoint_resident: they too keep their inputs alone for the backward pass, as the streamed ones must.
    Outputs and gradients are the plain model's, bit for bit; gradients flow to the inputs alone. The model stays whole
    (`state_dict` works), but `.to()` would undo this. To be called after what changes modules or their forwards (a
    compiled one as block.forward, not by block.compile(), which would compile what is put around it here), and to be
    used outside of autocast. Raises SettingsError.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    if not 0 <= resident <= len(blocks):
        raise SettingsError(
            f"--gpu-blocks is {resident}, expected 0 to {len(blocks)}: this transformer has so many blocks, and "
            f"those that are not resident are streamed; take {min(max(resident, 0), len(blocks))}"
        )
    if slots < 1:
        raise SettingsError(f"slots is {slots}, expected at least 1: a streamed block computes in one; take 2")
    transformer.eval().requires_grad_(False)
    # Blocks compute their forward pass again by themselves here.
    transformer.disable_gradient_checkpointing()
    streamed = streamed_blocks(resident, len(blocks))
    hosts = [HostBlock(blocks[index], device) for index in streamed]
    for module in _all_but(transformer, [blocks[index] for index in streamed]):
        module.to(device)
    ring = Ring(hosts, slots, device) if hosts else None
    place = {index: turn for turn, index in enumerate(streamed)}
    for index, block in enumerate(blocks):
        turn = partial(ring.turn, place[index]) if ring is not None and index in place else None
        if turn is not None or checkpoint_resident:
            block.forward = _Recomputing(block.forward, turn)
    return Streaming(transformer=transformer, hosts=hosts, ring=ring)


class _Recomputing:
    """The forward of a block, with its weights where they are needed, and computed again in the backward pass."""

    def __init__(self, forward: Callable[..., tuple[torch.Tensor, ...]], turn: Callable[[Pass], Any] | None) -> None:
        self._forward, self._turn = forward, turn or _resident_turn

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        tensors = (hidden_states, encoder_hidden_states, temb)
        rest = (image_rotary_emb, joint_attention_kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            outputs: tuple[torch.Tensor, ...] = _Block.apply(self, rest, *tensors)  # type: ignore[no-untyped-call]
            return outputs
        return self.run("alone", tensors, rest)

    def run(self, of: Pass, tensors: tuple[torch.Tensor, ...], rest: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """One forward pass."""
        with self._turn(of):
            return self._forward(*tensors, *rest)

    def gradients(
        self, inputs: list[torch.Tensor], rest: tuple[Any, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Of the inputs that require one, from those of the outputs; None for the others."""
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        # The backward pass of a linear reads its weight: the turn lasts until it is through.
        with self._turn("backward"), torch.enable_grad():
            outputs = self._forward(*inputs, *rest)
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
    """A block that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, block: _Recomputing, rest: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
        ctx.block, ctx.rest = block, rest
        ctx.save_for_backward(*tensors)
        # Zeros in place of no gradient would be added to others, and computed with.
        ctx.set_materialize_grads(False)
        return block.run("forward", tensors, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        return None, None, *ctx.block.gradients(inputs, ctx.rest, gradients)


def _all_but(transformer: torch.nn.Module, streamed: list[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for child in transformer.children():
        parts = child if isinstance(child, torch.nn.ModuleList) else [child]
        yield from (part for part in parts if not any(part is block for block in streamed))


def _pinned(size_bytes: int) -> torch.Tensor:
    """Page-locked uint8 memory of this size. Not pin_memory=True: its allocator rounds up to a power of two."""
    runtime = torch.cuda.cudart()
    whole_bytes = -(-size_bytes // _PAGE) * _PAGE
    # Pages of its own, for a page can be registered once.
    memory = torch.empty(whole_bytes + _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    flat = memory[start : start + size_bytes]
    error = int(runtime.cudaHostRegister(flat.data_ptr(), whole_bytes, _PORTABLE))
    if error:
        raise SettingsError(
            f"{size_bytes / 2**30:.2f} GiB of host memory for a streamed block cannot be pinned (CUDA error {error}): "
            f"streamed blocks lie there whole; raise the limit of locked memory (ulimit -l), or --gpu-blocks"
        )
    weakref.finalize(flat, _unpin, runtime, flat.data_ptr()).atexit = False
    return flat


def _unpin(runtime: Any, address: int) -> None:
    # A copy from it may still be under way.
    torch.cuda.synchronize()
    runtime.cudaHostUnregister(address)
