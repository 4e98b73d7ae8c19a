"""Train and sample through a frozen transformer that does not fit on the GPU, by streaming exact weights of its blocks.

A streamed block computes with its weights in a ring of slots on the device (ring.py). In the backward pass each block
recomputes its forward pass.
Based on the idea of musubi-tuner's host-to-device block swap (Apache-2.0), without its code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from secondcast.models.families.anatomy import Anatomy
from secondcast.models.families.registry import anatomy_of
from secondcast.models.memory.blocks import SLOTS, streamed_blocks
from secondcast.models.memory.modulation_table import check_modulation
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.ring import HostBlock, Pass, Ring
from secondcast.storage_schemas.errors import SettingsError


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
        streamed = {id(tensor) for host in self.hosts for tensor in host.tensors}
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
