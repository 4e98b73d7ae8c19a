"""The rate of matrix products on this machine, the reference for the speed of training."""

import time
from functools import cache

import torch

# Large enough for the full rate of a GPU or of many cores, after a size that is fast on a slow machine.
_GPU_SIDES, _CPU_SIDES = (4096, 8192), (512, 1024, 2048)
_ROUNDS, _GPU_PRODUCTS = 12, 8


@cache
def matrix_rate(
    device: torch.device, dtype: torch.dtype, *, sides: tuple[int, ...] | None = None, limit_seconds: float = 0.4
) -> float:
    """FLOP/s of products of two square matrices, the best of several rounds; measured once per process.

    sides: sizes of the matrices, ascending; None: the default of the device.
    limit_seconds: rounds that would exceed this are skipped, except the first two products.

    Returns 0 if the device is out of memory.
    """
    best, end = 0.0, time.perf_counter() + limit_seconds
    for side in sides or (_GPU_SIDES if device.type == "cuda" else _CPU_SIDES):
        if best and time.perf_counter() + 2 * side**3 / best > end:
            break
        try:
            best = max(best, _rate_of(side, device, dtype, end))
        except torch.OutOfMemoryError:
            break
    return best


@torch.no_grad()
def _rate_of(side: int, device: torch.device, dtype: torch.dtype, end: float) -> float:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2))
    # The first product also loads the BLAS library.
    _seconds_of(a, b, 1)
    seconds = [_seconds_of(a, b, 1)]
    products = _GPU_PRODUCTS if device.type == "cuda" else 1
    while len(seconds) <= _ROUNDS and time.perf_counter() + products * min(seconds) < end:
        seconds.append(_seconds_of(a, b, products))
    return float(2 * side**3 / min(seconds))


def _seconds_of(a: torch.Tensor, b: torch.Tensor, products: int) -> float:
    """Seconds of one product, averaged over several."""
    _synchronize(a.device)
    began = time.perf_counter()
    for _ in range(products):
        a @ b
    _synchronize(a.device)
    return (time.perf_counter() - began) / products


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
