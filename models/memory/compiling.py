"""Compiled blocks of the frozen transformer: the graph of a kind of block is compiled once and all of them share it."""

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from secondcast.storage_schemas.errors import SettingsError

# Graphs of a kind of block in one process: at most 3 for each shape (batch, image tokens, text tokens). torch's own
# limit is 8, and what lies beyond it would be computed uncompiled.
LARGEST_GRAPHS = 192
# Rounds where the uncompiled block does: without it bfloat16 values stay in float32 between fused operations.
_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}

Tensors = tuple[torch.Tensor, ...]


def compile_blocks(transformer: FluxTransformer2DModel, *, backend: str = "inductor") -> None:
    """Have each block compute by a graph of its kind, compiled when a shape comes for the first time.

    In place, and before `stream_blocks`; checkpointing, a modulation table and an attention backend may be set before
    or after. backend: of torch.compile. A graph that cannot be whole is refused, not cut. Calls raise SettingsError where
    a block cannot be compiled or has more than LARGEST_GRAPHS graphs.
    """
    # Of float32 on a GPU; whether matrix products may round to TF32 is not for a speed-up to decide.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    options = _INDUCTOR if backend == "inductor" else None
    # Of a class, not of a block: the graph takes the weights as inputs.
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=False, backend=backend, options=options)
        for kind in {type(block) for block in blocks}
    }
    singles = {id(block) for block in transformer.single_transformer_blocks}
    for block in blocks:
        call = _Compiled(compiled[type(block)], joint=id(block) in singles)
        block.forward = MethodType(call, block)


def check_compiler(device: torch.device) -> None:
    """Raise SettingsError, saying what is missing, unless something tiny can be compiled for this device."""

    def tiny(x_N: torch.Tensor) -> torch.Tensor:
        return x_N.sin() + 1

    try:
        if device.type == "cpu":
            # What is in torch's cache on disk would be taken from there without one.
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(tiny, fullgraph=True, dynamic=False)(torch.zeros(8, device=device)).sum().item()
    # What is not there or does not run here fails in as many ways as there are compilers.
    except Exception as error:
        needs = "triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++, or name it in CXX"
        raise SettingsError(
            f"--compile does not work on {device} ({_reason(error)}): install {needs}; or leave the flag out, which "
            f"trains the same more slowly"
        ) from error


class _Compiled:
    """The forward of a kind of block. joint: of a single block, whose tokens are those of text and image together."""

    def __init__(self, compiled: Callable[..., Tensors], *, joint: bool) -> None:
        self._compiled, self._joint = compiled, joint

    def __call__(
        self,
        block: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensors:
        hidden_BSD, text_BTD, given = hidden_states, encoder_hidden_states, temb
        # Whether a gradient is wanted and how a tensor lies are part of what a graph is compiled for.
        if not torch.is_grad_enabled():
            hidden_BSD, text_BTD, given = hidden_BSD.detach(), text_BTD.detach(), given.detach()
        if self._joint:
            hidden_BSD, text_BTD = _as_of_a_single_block(hidden_BSD, text_BTD)
        limits = {"recompile_limit": LARGEST_GRAPHS, "accumulated_recompile_limit": 8 * LARGEST_GRAPHS}
        try:
            with torch._dynamo.config.patch(limits):
                return self._compiled(block, hidden_BSD, text_BTD, given, image_rotary_emb, joint_attention_kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise SettingsError(
                f"the blocks of the transformer met more than {LARGEST_GRAPHS} combinations of batch size, resolution "
                f"and text length: each is compiled by itself; give batches of one size, or leave --compile out"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise SettingsError(
                f"--compile does not work on the blocks of the transformer ({_reason(error)}): leave the flag out, "
                f"or --attention-backend or --quantize, if one of them is given"
            ) from error


def _as_of_a_single_block(hidden_BSD: torch.Tensor, text_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image tokens as a single block leaves them, parts of one tensor; the first one gets them apart."""
    tokens, width = hidden_BSD.shape[1:]
    # is_contiguous() would say so of each part of a batch of one.
    if hidden_BSD.stride() != (tokens * width, width, 1):
        return hidden_BSD, text_BTD
    joint_BSD = torch.cat([text_BTD, hidden_BSD], dim=1)
    return joint_BSD[:, text_BTD.shape[1] :], joint_BSD[:, : text_BTD.shape[1]]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0].rstrip(":.") if lines else type(error).__name__
