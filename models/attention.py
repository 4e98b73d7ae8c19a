"""The attention backend of a transformer: it affects the bits of results, so it is checked early and recorded."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch.nn.attention import SDPBackend

from secondcast.models.families.family import POOLED, Family
from secondcast.models.geometry import Geometry
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError, reason

# torch's scaled_dot_product_attention: diffusers' default, and the name that records have for it.
NATIVE = AttentionBackendName.NATIVE.value
RECORDED_NATIVE = "sdpa"
# In the trial of a backend.
_TEXT_TOKENS = 8


def recorded_attention(backend: str | None) -> str:
    """The name of a backend in the provenance of a shard; None is diffusers' default."""
    name = (backend or DIFFUSERS_ATTN_BACKEND).lower()
    return RECORDED_NATIVE if name == NATIVE else name


def backend_of_record(attention: str) -> str | None:
    """The inverse of `recorded_attention`, for rebuilding a shard."""
    return NATIVE if attention == RECORDED_NATIVE else attention


@torch.no_grad()
def attention_kernel(device: torch.device, dtype: torch.dtype, *, heads: int, tokens: int, head_width: int) -> str:
    """The kernel that torch's scaled_dot_product_attention chooses here for these shapes, such as flash_attention."""
    query_BHSD = torch.empty(1, heads, tokens, head_width, device=device, dtype=dtype)
    chosen = torch.ops.aten._fused_sdp_choice(query_BHSD, query_BHSD, query_BHSD)
    return SDPBackend(chosen).name.lower()


def check_attention(backend: str | None, teacher: TeacherFolder, *, dtype: torch.dtype, device: torch.device) -> None:
    """Raise SettingsError unless diffusers knows this backend and it works here.

    Runs a block of each kind with the backbone's head size, and small otherwise, before its weights are read.
    """
    if backend in (None, NATIVE):
        return
    if not teacher.family.attention_backends:
        raise SettingsError(
            f"--attention-backend is {backend!r}, expected none: the transformer of {teacher.family.title} always uses "
            f"torch's own attention; remove it"
        )
    known = sorted(name.value for name in AttentionBackendName)
    if backend.lower() not in known:
        raise SettingsError(
            f"--attention-backend {backend!r} is unknown to diffusers, expected one of {', '.join(known)}"
        )
    try:
        _try(backend, teacher.family, teacher.config("transformer"), dtype, device)
    # Missing or unsupported kernels raise many kinds of errors.
    except Exception as error:
        raise SettingsError(
            f"--attention-backend {backend!r} does not work on {device} in {str(dtype).removeprefix('torch.')} "
            f"({reason(error)}): install its package, or remove the flag to use torch's own"
        ) from error


def set_attention(transformer: Any, backend: str | None) -> None:
    """Set the attention backend of a transformer; None for diffusers' default. Other models are not affected."""
    if backend is None:
        transformer.reset_attention_backend()
        return
    # diffusers also changes the default of the process; the context restores it.
    with attention_backend(AttentionBackendName(DIFFUSERS_ATTN_BACKEND)):
        transformer.set_attention_backend(backend)


def _try(
    backend: str, family: Family, backbone_config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    config = family.tiny_config(backbone_config)
    transformer = getattr(diffusers, family.transformer).from_config(config).to(device=device, dtype=dtype)
    set_attention(transformer, backend)
    geometry = Geometry(height=4, width=4, rows=4, columns=4, channels=config["in_channels"])
    filled = partial(torch.ones, device=device, dtype=dtype)
    with torch.no_grad():
        velocity_BSC = family.call(
            transformer,
            filled(1, geometry.image_tokens, geometry.channels),
            filled(1, _TEXT_TOKENS, family.text_width(config)),
            {POOLED: filled(1, family.pooled_width(config))},
            filled(1, dtype=family.timestep_dtype(dtype)),
            None,
            family.positions(geometry, _TEXT_TOKENS, device=device, dtype=dtype),
        )
    # Kernels run asynchronously: their errors appear when the result is read.
    velocity_BSC.float().sum().item()
