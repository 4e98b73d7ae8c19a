"""The functions of torch that a CPU build lacks, for the simulated device. All that is replaced in torch is here."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from tests.simulated_cuda.device.kernels import attention, rms_norm
from tests.simulated_cuda.device.memory import DeviceMemory, PinnedMemory, Queue

# They and their dependencies look for more of a CUDA build if there is a device when they are imported.
_IMPORTED = torch._dynamo, FluxTransformer2DModel

# An H100: what the product asks of its properties only chooses kernels and the modulation.
NAME, TOTAL_BYTES = "simulated", int(79.2 * 2**30)


class Event:
    """Passed once the host has waited for the device after it was recorded."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self._recorded = queue, -1

    def record(self, stream: Any = None) -> None:
        """See torch.cuda.Event."""
        self._recorded = self._queue.waited

    def wait(self, stream: Any = None) -> None:
        """See torch.cuda.Event."""

    def query(self) -> bool:
        """See torch.cuda.Event."""
        return self._queue.waited > self._recorded

    def synchronize(self) -> None:
        """See torch.cuda.Event."""
        if not self.query():
            self._queue.wait("event")

    def elapsed_time(self, other: "Event") -> float:
        """See torch.cuda.Event."""
        return 0.0


class Stream:
    """A stream that computes at once: the order of work between streams is not simulated."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def wait_event(self, event: Event) -> None:
        """See torch.cuda.Stream."""

    def record_event(self) -> Event:
        """See torch.cuda.Stream."""
        event = Event(self._queue)
        event.record()
        return event


class Runtime:
    """The functions of CUDA's runtime library that pin host memory."""

    def __init__(self, pinned: PinnedMemory) -> None:
        self._pinned = pinned

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """See CUDA; 0 is success."""
        self._pinned.register(address, size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """See CUDA."""
        self._pinned.unregister(address)
        return 0


class Properties:
    """See torch.cuda.get_device_properties."""

    name, total_memory, major, minor = NAME, TOTAL_BYTES, 9, 0


def install(memory: DeviceMemory, queue: Queue, pinned: PinnedMemory) -> None:
    """Replace what is missing, for the rest of the process."""
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: Properties,
        "get_device_capability": lambda device=None: (Properties.major, Properties.minor),
        "mem_get_info": lambda device=None: (TOTAL_BYTES, TOTAL_BYTES),
        "max_memory_allocated": lambda device=None: memory.allocator.peak_allocated,
        "max_memory_reserved": lambda device=None: memory.allocator.peak_reserved,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": memory.allocator.empty_cache,
        "synchronize": lambda device=None: queue.wait("synchronize"),
        "cudart": lambda: Runtime(pinned),
        "Stream": lambda device=None: Stream(queue),
        "Event": lambda enable_timing=False: Event(queue),
        "current_stream": lambda device=None: Stream(queue),
        "stream": _stream,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.register(copy.data_ptr(), copy.nbytes)
        weakref.finalize(copy.untyped_storage(), pinned.unregister, copy.data_ptr()).atexit = False
        return copy

    torch.Tensor.pin_memory = pin_memory  # type: ignore[assignment,method-assign]
    FakeTensor.numpy = _numpy  # type: ignore[method-assign]
    FakeTensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    FakeTensor.data = property(_data, _set_data)  # type: ignore[assignment]
    functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm
    # As on a GPU, a moved parameter is the same object, and shared ones stay shared: `data =` cannot give a tensor
    # without data the place of one with data.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # torch.tensor(..., device="cuda") makes a host tensor first and copies it, which can be seen.
    torch._C._set_only_lift_cpu_tensors(True)


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


def _numpy(tensor: FakeTensor, *, force: bool = False) -> Any:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first.")
    with torch._C._DisableTorchDispatch():
        return torch.ones(tensor.shape, dtype=tensor.dtype).numpy()


def _data(tensor: FakeTensor) -> torch.Tensor:
    data: torch.Tensor = torch.Tensor.data.__get__(tensor)
    return data


def _set_data(tensor: FakeTensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, which leaves the device of a FakeTensor as it was, and refuses a value with data."""
    if not isinstance(value, FakeTensor):
        value = tensor.fake_mode.from_tensor(value)
    torch.Tensor.data.__set__(tensor, value)
    tensor.fake_device = value.fake_device
