"""Backbones of random weights, loaded with memory options, and calls of them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import Geometry
from secondcast.models.memory.conditions import Conditions
from secondcast.models.memory.options import MemoryOptions

CPU = torch.device("cpu")
GEOMETRY = Geometry(height=16, width=16, rows=4, columns=4, channels=16)
TIMESTEPS, GUIDANCE = (1.0, 0.9, 0.65, 0.25, 0.0625), (2.0, 2.5, 3.5, 5.0)
# Wide enough that a CPU's matrix product of another number of rows has other bits.
WIDE = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 24, "pooled_projection_dim": 8, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


def wide_flux(folder: Path, *, guidance: bool) -> Path:
    torch.manual_seed(3)
    FluxTransformer2DModel(**WIDE, guidance_embeds=guidance).save_pretrained(folder / "transformer")
    return folder


def pairs(*, guidance: bool) -> tuple[tuple[float, float | None], ...]:
    return tuple((t, g) for t in TIMESTEPS for g in (GUIDANCE if guidance else (None,)))


def load(folder: Path, dtype: torch.dtype, *, batch_rows: int | None = None, **options: Any) -> Backbone:
    """With a table made in calls of batch_rows rows, or live."""
    guidance = bool(FluxTransformer2DModel.load_config(folder, subfolder="transformer")["guidance_embeds"])
    conditions = None
    if batch_rows is not None:
        # The cache's timesteps are of its dtype.
        conditions = Conditions(pairs=pairs(guidance=guidance), batch_rows=batch_rows)
    return Backbone.load(
        folder, GEOMETRY, text_length=5, dtype=dtype, device=CPU, options=MemoryOptions(**options),
        conditions=conditions,
    )  # fmt: skip


def call(
    backbone: Backbone,
    conditions: list[tuple[float, float | None]],
    geometry: Geometry = GEOMETRY,
    seed: int = 0,
    *,
    pooled_BP: torch.Tensor | None = None,
    modulation_BM: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """velocity_BSC, and the gradient of its weighted sum with respect to the embedding; pooled is zero unless given."""
    random, rows, dtype = torch.Generator().manual_seed(seed), len(conditions), backbone.dtype
    x_BSC = torch.randn(rows, geometry.image_tokens, geometry.channels, generator=random).to(dtype)
    text_BTD = torch.randn(rows, 5, 24, generator=random).to(dtype).requires_grad_()
    weight_BSC = torch.randn(x_BSC.shape, generator=random)
    timestep_B = torch.tensor([t for t, _ in conditions], dtype=dtype)
    guidance = [g for _, g in conditions if g is not None]
    conditioning = backbone.zero_pooled(rows) if pooled_BP is None else {"pooled_projections": pooled_BP}
    guidance_B = torch.tensor(guidance) if guidance else None
    velocity_BSC = backbone.predict(x_BSC, text_BTD, conditioning, timestep_B, guidance_B, modulation_BM=modulation_BM)
    (velocity_BSC.float() * weight_BSC).sum().backward()
    return velocity_BSC.detach(), text_BTD.grad
