"""Compiled blocks of the frozen transformer: all blocks of a kind share one compiled graph."""

import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from secondcast.models.families.registry import anatomy_of
from secondcast.storage_schemas.errors import SettingsError

# Maximum number of graphs of a kind of block in one process, of which each shape (batch, image tokens, text tokens)
# needs at most 3. Beyond torch's default limit of 8 blocks would run uncompiled.
LARGEST_GRAPHS = 192
# Rounds like the uncompiled block: without it bfloat16 values stay in float32 between fused operations.
_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}

Tensors = tuple[torch.Tensor, ...]


def compile_blocks(transformer: Any, *, backend: str = "inductor") -> None:
    """Compile the forward of each block in place; a graph is compiled at the first batch of each shape.

    Call it before `stream_blocks`; checkpointing, a modulation table and an attention backend may be set before or
    after. Graph breaks are errors.

    backend: backend of torch.compile.

    Calls of a block raise SettingsError if it cannot be compiled or has more than LARGEST_GRAPHS graphs.
    """
    # For float32 on a GPU; TF32 is not enabled here, because it would change the results.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    blocks = anatomy_of(transformer).blocks(transformer)
    options = _INDUCTOR if backend == "inductor" else None
    # Compile the forward of the class, not of a block, so that weights are inputs of the graph.
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=False, backend=backend, options=options)
        for kind in {type(block) for block in blocks}
    }
    for kind in anatomy_of(transformer).block_lists:
        for block in getattr(transformer, kind.attribute):
            call = _Compiled(type(block), compiled[type(block)], joint=kind.joint)
            block.forward = MethodType(call, block)


def check_compiler(device: torch.device) -> None:
    """Raise SettingsError, naming the missing package, unless a tiny function can be compiled for this device."""

    def tiny(x_N: torch.Tensor) -> torch.Tensor:
        return x_N.sin() + 1

    try:
        if device.type == "cpu":
            # A hit in torch's cache on disk would not need the compiler.
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(tiny, fullgraph=True, dynamic=False)(torch.zeros(8, device=device)).sum().item()
    # Missing or unsupported compilers raise many kinds of errors.
    except Exception as error:
        needs = "triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++, or name it in CXX"
        raise SettingsError(
            f"--compile does not work on {device} ({_reason(error)}): install {needs}; or remove the flag, which only "
            f"makes training slower"
        ) from error


class _Compiled:
    """The forward of a kind of block. joint: whether it is a single block, which joins text and image tokens."""

    def __init__(self, kind: type[torch.nn.Module], compiled: Callable[..., Tensors], *, joint: bool) -> None:
        self._names = tuple(inspect.signature(kind.forward).parameters)[1:]
        self._compiled, self._joint = compiled, joint

    def __call__(self, block: torch.nn.Module, *given: Any, **named: Any) -> Tensors:
        values = dict(zip(self._names, given, strict=False)) | named
        # Graphs are specialized on requires_grad and strides.
        if not torch.is_grad_enabled():
            values = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        if self._joint:
            values["hidden_states"], values["encoder_hidden_states"] = _as_of_a_single_block(
                values["hidden_states"], values["encoder_hidden_states"]
            )
        limits = {"recompile_limit": LARGEST_GRAPHS, "accumulated_recompile_limit": 8 * LARGEST_GRAPHS}
        try:
            with torch._dynamo.config.patch(limits):
                return self._compiled(block, **values)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise SettingsError(
                f"the transformer's blocks need more than {LARGEST_GRAPHS} graphs, one for each batch size, resolution "
                f"and text length: use batches of one size, or remove --compile"
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise SettingsError(
                f"--compile does not work on the transformer's blocks ({_reason(error)}): remove the flag, or "
                f"--attention-backend or --quantize if one of them is given"
            ) from error


def _as_of_a_single_block(hidden_BSD: torch.Tensor, text_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image tokens as views of one tensor, as single blocks return them; the first gets separate ones."""
    tokens, width = hidden_BSD.shape[1:]
    # is_contiguous() is true for each part of a batch of one.
    if hidden_BSD.stride() != (tokens * width, width, 1):
        return hidden_BSD, text_BTD
    joint_BSD = torch.cat([text_BTD, hidden_BSD], dim=1)
    return joint_BSD[:, text_BTD.shape[1] :], joint_BSD[:, : text_BTD.shape[1]]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return lines[0].rstrip(":.") if lines else type(error).__name__
