"""A family's pipeline around a loaded transformer: the reference that sampling must equal (invariant 1)."""

from typing import Any

import torch

from secondcast.models.families.family import Family


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
        embedding_BTD: torch.Tensor,
        pooled_BP: torch.Tensor,
        *,
        guidance: float | None,
        steps: int,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """x_K, packed, with one guidance value for all rows."""
        latents_BSC: torch.Tensor = self._pipeline(
            prompt_embeds=embedding_BTD,
            pooled_prompt_embeds=pooled_BP,
            latents=noise_BSC.clone(),
            guidance_scale=0.0 if guidance is None else guidance,
            num_inference_steps=steps,
            output_type="latent",
            return_dict=False,
            **self._family.image_size(height=height, width=width),
        )[0]
        return latents_BSC
