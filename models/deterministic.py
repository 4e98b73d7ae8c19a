"""Deterministic kernels, with which a run on CUDA repeats bit for bit; on a CPU torch is deterministic anyway."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Of the fused kernels only FlashAttention has a deterministic backward pass.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
# cuBLAS is deterministic with a workspace of fixed size, which it reads before its first product.
# Source: torch.use_deterministic_algorithms.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(enabled: bool = True) -> Iterator[None]:
    """A context in which torch and its attention use deterministic kernels only, in all threads.

    enabled: False changes nothing.

    An operation without such a kernel raises RuntimeError.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault(*_WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with sdpa_kernel(_KERNELS):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@torch.no_grad()
def attention_kernel(device: torch.device, dtype: torch.dtype, *, heads: int, tokens: int, head_width: int) -> str:
    """The kernel that torch's scaled_dot_product_attention chooses here for these shapes, such as flash_attention."""
    query_BHSD = torch.empty(1, heads, tokens, head_width, device=device, dtype=dtype)
    chosen = torch.ops.aten._fused_sdp_choice(query_BHSD, query_BHSD, query_BHSD)
    return SDPBackend(chosen).name.lower()
