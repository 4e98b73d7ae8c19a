"""Attention and RMS norm in one kernel, as on CUDA, where a CPU build of torch takes several operations.

They save their inputs, their output and a float per row, nothing else.
"""

from typing import Any

import torch
from torch.nn import functional

_CPU_ATTENTION, _CPU_RMS_NORM = functional.scaled_dot_product_attention, functional.rms_norm


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention: FlashAttention, or the memory-efficient kernel."""
    if query.device.type != "cuda":
        return _CPU_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **named)
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=named.get("scale"))[0]
    keeps = torch.is_grad_enabled() and query.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=named.get("scale"))[0]


def rms_norm(
    input: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """torch.nn.functional.rms_norm."""
    if input.device.type != "cuda":
        return _CPU_RMS_NORM(input, normalized_shape, weight, eps)
    normed: torch.Tensor = _RmsNorm.apply(input, weight)
    return normed


class _RmsNorm(torch.autograd.Function):
    """aten::_fused_rms_norm."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        scale = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, weight, scale)
        # Reads both, so that a weight on another device is an error.
        return hidden.clone() if weight is None else hidden * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        hidden, *_ = ctx.saved_tensors
        return hidden * gradient, None
