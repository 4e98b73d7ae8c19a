"""A family's pipeline around a loaded transformer: the reference that sampling must equal (invariant 1)."""

from typing import Any

import torch

from secondcast.models.families.family import Family
from secondcast.models.families.text import Text
from secondcast.models.geometry import Geometry


class ReferencePipeline:
    """The unmodified pipeline with a transformer and the teacher's scheduler; no text encoder, no weights of the VAE.

    transformer: as loaded by diffusers; call within Backbone.called_by_a_pipeline if a backbone changed it.
    """

    def __init__(
        self, family: Family, transformer: Any, *, scheduler_config: dict[str, Any], vae_config: dict[str, Any]
    ) -> None:
        self._family = family
        self._pipeline = family.reference(transformer, scheduler_config, vae_config)

    @torch.no_grad()
    def final_latents(
        self,
        noise_BSC: torch.Tensor,
        text: Text,
        geometry: Geometry,
        *,
        negative: Text | None,
        guidance: float | None,
        steps: int,
    ) -> torch.Tensor:
        """x_K, packed, with one guidance value for all rows.

        negative: a row for each of the batch.
        """
        family = self._family
        inputs = family.reference_inputs(text.conditioning, text.embedding_BTD)
        if negative is not None:
            inputs |= family.reference_inputs(negative.conditioning, negative.embedding_BTD, negative=True)
        return family.final_latents(
            self._pipeline,
            **inputs,
            latents=family.unpacked(noise_BSC, geometry).clone(),
            guidance_scale=0.0 if guidance is None else guidance,
            num_inference_steps=steps,
            **family.image_size(height=geometry.height, width=geometry.width),
        )
