"""Count FLOPs and bytes by running the real networks on the meta device, where tensors have shapes but no data.

The meta device decomposes attention into matrix products and RMS norm into elementwise operations, unlike the kernels
of a GPU; to count bytes both are replaced by what fused kernels save: output and log-sum-exp, input and scale.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_ATTENTION = ("bmm", "scaled_dot_product")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations (a multiply-add is two) in linears, convolutions and attention."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.linear + self.attention


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters of a module, counting shared ones once, and a quantized matrix as what it stands for."""
    quantized = sum(getattr(module, "quantized_weights", 0) for module in model.modules())
    return quantized + sum(parameter.numel() for parameter in model.parameters())


def count_flops(run: Callable[[], Any]) -> Flops:
    """FLOPs of `run`, on meta or other tensors."""
    with FlopCounterMode(display=False) as counter:
        run()
    linear = attention = 0
    for operation, count in counter.get_flop_counts().get("Global", {}).items():
        if any(name in str(operation) for name in _ATTENTION):
            attention += count
        else:
            linear += count
    return Flops(linear=linear, attention=attention)


def peak_bytes(run: Callable[[], Any], parameters: Sequence[torch.Tensor], *, gradients: bool = False) -> int:
    """Peak bytes of tensors other than `parameters` while `run` computes eagerly.

    gradients: whether `run` has a backward pass.
    """
    with torch.set_grad_enabled(gradients), _FusedKernels(), _LiveBytes(parameters) as live:
        run()
    return live.peak


def moved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that kernels without matrix products read and write in `run`: its elementwise operations and norms."""
    with torch.no_grad(), _FusedKernels(), _MovedBytes() as moved:
        run()
    return moved.total


def saved_bytes(run: Callable[[], Any], parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors saved for the backward pass of the result of `run`, without `parameters`."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), _FusedKernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        # Keep the result until the sum is computed, because freed addresses may be reused.
        result = run()
    total = sum(found.values())
    del result
    return total


class _LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations create."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.peak = self._now = 0
        # Views of parameters are results too, but need no new memory.
        self._live = {parameter.untyped_storage()._cdata for parameter in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._now -= size


class _MovedBytes(TorchDispatchMode):
    """Adds up the inputs and results of operations that have no FLOPs and make new tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            return result
        inputs = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        known = {value.untyped_storage()._cdata for value in inputs.values()}
        made = [
            v for v in tree_leaves(result) if isinstance(v, torch.Tensor) and v.untyped_storage()._cdata not in known
        ]
        if made and inputs:
            self.total += sum(map(_kernel_bytes, (*inputs.values(), *made)))
        return result


def _kernel_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory: less than its values if it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _FusedKernels(TorchFunctionMode):
    """Attention and RMS norm with the memory use of fused kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.nn.functional.rms_norm:
            weight = named.get("weight", args[2] if len(args) > 2 else None)
            return _FusedNorm.apply(args[0], weight)  # type: ignore[no-untyped-call]  # torch leaves it without types
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **named)
        query, key, value = (*args, *(named[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # as above


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # In the layout of the query, as fused kernels do; not empty_like, whose argument would count as read.
        output = torch.empty_strided(query.shape, query.stride(), dtype=query.dtype, device=query.device)
        logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        scale = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, scale)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.empty_like(ctx.saved_tensors[0]), None
