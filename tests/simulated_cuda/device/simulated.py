"""A CUDA device for a CPU build of torch: its tensors have shapes but no data (FakeTensorMode), and are counted.

The host computes as usual, except with tensors that come from the device or from a checkpoint, which have no data
either: values that are read from them are ones.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secondcast.models.memory.peak import release_memory
from tests.simulated_cuda.device.allocator import GIB
from tests.simulated_cuda.device.memory import DeviceMemory, PinnedMemory, Queue
from tests.simulated_cuda.device.torch_cuda import install

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# What `tensor.device` dispatches: most of all operations.
_DEVICE = torch.ops.prim.device.default
# All others are subclasses, such as quantized weights.
_PLAIN = frozenset({FakeTensor, torch.nn.Parameter, torch.Tensor})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Peaks of a run.

    emptied: how often torch gave cached memory back to the device because there was too little left.
    waits: the places where the host waited for the device, with their counts.
    """

    allocated_gib: float
    reserved_gib: float
    emptied: int
    waits: dict[str, int]


class SimulatedCuda(TorchDispatchMode):
    """Sends operations on device tensors to FakeTensorMode, and records memory, copies and host reads.

    Create one per process: it replaces functions of torch.cuda.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.queue, self.pinned = DeviceMemory(), Queue(), PinnedMemory()
        self.without_data = _WithoutData(allow_non_fake_inputs=True)
        install(self.memory, self.queue, self.pinned)

    def fit_into(self, gib: float) -> None:
        """Have so much memory from now on, and begin new peaks."""
        self.memory.allocator.limit = gib * GIB
        self.release()

    def release(self) -> None:
        """Free what nothing refers to, and begin new peaks."""
        release_memory(CUDA)
        self.memory.allocator.reset_peaks()

    def measured(self) -> Measured:
        """The peaks since the last call, and the waits since they were cleared."""
        allocator = self.memory.allocator
        found = Measured(
            allocated_gib=allocator.peak_allocated / GIB,
            reserved_gib=allocator.peak_reserved / GIB,
            emptied=allocator.emptied,
            waits=dict(self.queue.waits),
        )
        self.queue.waits.clear()
        allocator.reset_peaks()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        named = kwargs or {}
        # They take themselves apart first.
        if not _PLAIN.issuperset(types):
            return NotImplemented
        if FakeTensor not in types and not _is_cuda(named.get("device")):
            return func(*args, **named)
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        self._wait_for_copy(func, args, named)
        result = self.without_data.dispatch(func, types, args, named)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0]
        self._follow(func, args, result)
        return result

    def _follow(self, func: Any, args: Any, result: Any) -> None:
        made = [t for t in tree_leaves(result) if isinstance(t, FakeTensor) and t.device.type == "cuda"]
        for tensor in made:
            self.memory.follow(tensor)
        self.memory.workspace(func, args)
        # Operations on lists of tensors return nothing.
        if (made or result is None) and not func.is_view:
            self.queue.launch()

    def _read(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.device.type == "cuda":
            self.queue.wait("host read")
        return torch.ones((), dtype=tensor.dtype).item()

    def _wait_for_copy(self, func: Any, args: Any, named: Any) -> None:
        """Wait in copies between host and device, unless they are asynchronous and the host's memory is pinned."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            asynchronous = bool(named.get("non_blocking") or args[2:3] == (True,))
            to, host = target.device, target if source.device.type == "cuda" else source
        elif func is aten._to_copy.default:
            source = host = args[0]
            asynchronous, to = bool(named.get("non_blocking")), torch.device(named.get("device") or source.device)
        else:
            return
        if to.type == source.device.type:
            return
        # A new host tensor is not pinned, but nothing waits for an asynchronous copy to the host either.
        pinned = to.type == "cpu" or self.pinned.holds(host)
        if not (asynchronous and pinned):
            self.queue.wait(f"copy of {tuple(source.shape)} to {to.type}")


class _WithoutData(FakeTensorMode):
    """FakeTensorMode in several threads at once, and for tensors that Module.to moves in place."""

    # Where torch.cuda has a device, FakeTensorMode would allocate on it.
    avoid_device_init = property(lambda self: True)  # type: ignore[assignment]

    def __init__(self, **options: Any) -> None:
        self._of_thread = threading.local()
        super().__init__(**options)
        self.fake_tensor_converter = _Converter()

    @property
    def enter_stack(self) -> list[Any]:  # type: ignore[override]
        """What leaving the mode restores; of this thread, where torch has one for all."""
        stack: list[Any] = self._of_thread.__dict__.setdefault("stack", [])
        return stack

    @enter_stack.setter
    def enter_stack(self, stack: list[Any]) -> None:
        self._of_thread.stack = stack


class _Converter(FakeTensorConverter):
    """Remembers no tensors: those with weak references to them cannot be moved in place."""

    def from_real_tensor(self, fake_mode: FakeTensorMode, t: torch.Tensor, *_: Any, **__: Any) -> FakeTensor:
        return without_data(fake_mode, t)

    def set_tensor_memo(self, t: torch.Tensor, v: FakeTensor) -> None:
        pass


def without_data(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """A tensor like another one, with its device, but without its data."""
    with torch._C._DisableTorchDispatch():
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, like, tensor.device)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
