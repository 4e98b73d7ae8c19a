"""The frozen diffusion transformer behind one call: a latent and a text embedding in, a velocity out."""

from pathlib import Path
from typing import Self

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError

from models.attention import set_attention
from models.geometry import Geometry
from storage_schemas.errors import BadTeacher


class FluxBackbone:
    """FLUX's transformer (dev and schnell), frozen, in eval mode, for one geometry and text length.

    Calls it exactly as FluxPipeline does: no attention mask, all text positions 0.
    """

    def __init__(self, transformer: FluxTransformer2DModel, geometry: Geometry, *, text_length: int) -> None:
        self.transformer = transformer.eval().requires_grad_(False)
        self.takes_guidance = bool(transformer.config.guidance_embeds)
        self.dtype, self.device = transformer.dtype, transformer.device
        self.attention_backend: str | None = None
        self._image_ids_S3 = _image_ids(geometry).to(device=self.device, dtype=self.dtype)
        self._text_ids_T3 = torch.zeros(text_length, 3, device=self.device, dtype=self.dtype)
        self._pooled_width = int(transformer.config.pooled_projection_dim)

    @classmethod
    def load(
        cls,
        folder: Path,
        geometry: Geometry,
        *,
        text_length: int,
        dtype: torch.dtype,
        device: torch.device,
        attention_backend: str | None = None,
    ) -> Self:
        """Load `folder`/transformer and nothing else. attention_backend: see models/attention.py."""
        try:
            transformer = FluxTransformer2DModel.from_pretrained(
                folder,
                subfolder="transformer",
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise BadTeacher(f"{folder}/transformer cannot be loaded ({reason}): download it again") from error
        backbone = cls(transformer.to(device), geometry, text_length=text_length)
        backbone.use_attention(attention_backend)
        return backbone

    def use_attention(self, backend: str | None) -> None:
        """Compute attention by this backend of diffusers from now on; None for its default."""
        if backend != self.attention_backend:
            set_attention(self.transformer, backend)
            self.attention_backend = backend

    def zero_pooled(self, batch: int) -> torch.Tensor:
        """The pooled vector of the paper's training: zeros, [B, P]."""
        return torch.zeros(batch, self._pooled_width, device=self.device, dtype=self.dtype)

    def predict(
        self,
        hidden_states_BSC: torch.Tensor,
        encoder_hidden_states_BTD: torch.Tensor,
        pooled_projections_BP: torch.Tensor,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """velocity_BSC. timestep in [0, 1], of the backbone's dtype; guidance fp32, as FluxPipeline passes it.

        Gradients flow to `encoder_hidden_states_BTD`; the weights are frozen.
        """
        velocity_BSC: torch.Tensor = self.transformer(
            hidden_states=hidden_states_BSC,
            timestep=timestep_B,
            guidance=guidance_B if self.takes_guidance else None,
            pooled_projections=pooled_projections_BP,
            encoder_hidden_states=encoder_hidden_states_BTD,
            # A student with positions for fewer tokens than the teacher gives so many.
            txt_ids=self._text_ids_T3[: encoder_hidden_states_BTD.shape[1]],
            img_ids=self._image_ids_S3,
            return_dict=False,
        )[0]
        return velocity_BSC


def _image_ids(geometry: Geometry) -> torch.Tensor:
    ids = torch.zeros(geometry.rows, geometry.columns, 3)
    ids[..., 1] += torch.arange(geometry.rows)[:, None]
    ids[..., 2] += torch.arange(geometry.columns)[None, :]
    return ids.reshape(geometry.image_tokens, 3)
