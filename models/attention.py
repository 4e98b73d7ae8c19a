"""The attention backend of a transformer: it affects the bits of results, so it is checked early and recorded."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from secondcast.storage_schemas.errors import SettingsError, reason

# torch's scaled_dot_product_attention: diffusers' default, and the name that records have for it.
NATIVE = AttentionBackendName.NATIVE.value
RECORDED_NATIVE = "sdpa"


def recorded_attention(backend: str | None) -> str:
    """The name of a backend in the provenance of a shard; None is diffusers' default."""
    name = (backend or DIFFUSERS_ATTN_BACKEND).lower()
    return RECORDED_NATIVE if name == NATIVE else name


def backend_of_record(attention: str) -> str | None:
    """The inverse of `recorded_attention`, for rebuilding a shard."""
    return NATIVE if attention == RECORDED_NATIVE else attention


def check_attention(
    backend: str | None, backbone_config: dict[str, Any], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise SettingsError unless diffusers knows this backend and it works here.

    Runs two small blocks with the backbone's head size, before its weights are read.
    """
    if backend in (None, NATIVE):
        return
    known = sorted(name.value for name in AttentionBackendName)
    if backend.lower() not in known:
        raise SettingsError(
            f"--attention-backend {backend!r} is unknown to diffusers, expected one of {', '.join(known)}"
        )
    try:
        _try(backend, backbone_config, dtype, device)
    # Missing or unsupported kernels raise many kinds of errors.
    except Exception as error:
        raise SettingsError(
            f"--attention-backend {backend!r} does not work on {device} in {str(dtype).removeprefix('torch.')} "
            f"({reason(error)}): install its package, or remove the flag to use torch's own"
        ) from error


def set_attention(transformer: FluxTransformer2DModel, backend: str | None) -> None:
    """Set the attention backend of a transformer; None for diffusers' default. Other models are not affected."""
    if backend is None:
        transformer.reset_attention_backend()
        return
    # diffusers also changes the default of the process; the context restores it.
    with attention_backend(AttentionBackendName(DIFFUSERS_ATTN_BACKEND)):
        transformer.set_attention_backend(backend)


def _try(backend: str, backbone_config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=backbone_config["attention_head_dim"],
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        axes_dims_rope=tuple(backbone_config["axes_dims_rope"]),
    ).to(device=device, dtype=dtype)
    set_attention(transformer, backend)
    with torch.no_grad():
        velocity_BSC = transformer(
            hidden_states=torch.zeros(1, 16, 4, device=device, dtype=dtype),
            timestep=torch.ones(1, device=device, dtype=dtype),
            pooled_projections=torch.zeros(1, 4, device=device, dtype=dtype),
            encoder_hidden_states=torch.zeros(1, 8, 4, device=device, dtype=dtype),
            txt_ids=torch.zeros(8, 3, device=device, dtype=dtype),
            img_ids=torch.zeros(16, 3, device=device, dtype=dtype),
            return_dict=False,
        )[0]
    # Kernels run asynchronously: their errors appear when the result is read.
    velocity_BSC.float().sum().item()
