"""FluxPipeline around a loaded transformer: the reference that sampling must equal (invariant 1)."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from secondcast.models.backbone import FluxBackbone
from secondcast.models.teacher.folder import TeacherFolder


class ReferencePipeline:
    """The unmodified FluxPipeline with a backbone's transformer and the teacher's scheduler; no text encoder."""

    def __init__(self, teacher: TeacherFolder, backbone: FluxBackbone) -> None:
        # The pipeline only reads the latent size from the VAE, so its weights do not matter.
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(teacher.config("vae"))
        self._backbone = backbone
        self._pipeline: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(teacher.config("scheduler")),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=backbone.transformer,
        )
        self._pipeline.set_progress_bar_config(disable=True)

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
        with self._backbone.called_by_a_pipeline():
            latents_BSC: torch.Tensor = self._pipeline(
                prompt_embeds=embedding_BTD,
                pooled_prompt_embeds=pooled_BP,
                latents=noise_BSC.clone(),
                guidance_scale=0.0 if guidance is None else guidance,
                num_inference_steps=steps,
                height=height,
                width=width,
                output_type="latent",
                return_dict=False,
            )[0]
        return latents_BSC
