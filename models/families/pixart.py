"""PixArt-Sigma."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secondcast.models.families.anatomy import Anatomy, BlockList, run_block
from secondcast.models.families.encoders.interface import Conditioning
from secondcast.models.families.family import TEXT_MASK, Part
from secondcast.models.families.licences import OPENRAIL
from secondcast.models.families.patches import PatchedLatents
from secondcast.models.families.reads_t5 import t5_part
from secondcast.storage_schemas.errors import MissingExtraError, TeacherError, reason
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.recording import ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule

# Below it, at the first steps, clean latents are mostly error.
_LEAST_ALPHA = 0.01
# What PixArtSigmaPipeline passes for models without conditions of resolution and aspect ratio.
_NO_CONDITIONS = {"resolution": None, "aspect_ratio": None}


class PixArt(PatchedLatents):
    """PixArt-Sigma as PixArtSigmaPipeline calls it: T5 alone, padding masked, predictions of noise.

    The transformer also predicts variances, which the pipeline drops. sigma_k is the standard deviation of the noise in
    a latent of variance 1.
    """

    def check_transformer(self, config: Mapping[str, Any], file: str) -> None:
        """Refuse PixArt-Alpha, whose transformer also reads resolution and aspect ratio."""
        self.check_patches(config, file)
        conditions = config.get("use_additional_conditions")
        if conditions or (conditions is None and config["sample_size"] == 128):
            raise TeacherError(
                f"{file} has use_additional_conditions = {conditions}, expected false: it reads resolution and aspect "
                f"ratio as PixArt-Alpha does; give {' or '.join(self.models)}"
            )

    def text_width(self, config: Mapping[str, Any]) -> int:
        """D is that of the captions."""
        return int(config["caption_channels"])

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """By classifier-free guidance."""
        return True

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """By clean_caption of the pipeline, its default."""
        if missing := [name for name in ("bs4", "ftfy") if find_spec(name) is None]:
            raise MissingExtraError(
                f"{self.pipeline} cleans captions and {missing[0]} is not installed: pip install 'secondcast[pixart]'"
            )
        from diffusers import PixArtSigmaPipeline

        with warnings.catch_warnings():
            # Of bs4, for texts that look like names of files.
            warnings.simplefilter("ignore")
            # The method reads the class alone; a pipeline would need all its parts.
            cleaned: list[str] = PixArtSigmaPipeline._text_preprocessing(
                object.__new__(PixArtSigmaPipeline), list(texts), clean_caption=True
            )
        return cleaned

    def vae_input(self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae: Any) -> "torch.Tensor":
        """Unpacked, then scaled. Source: PixArtSigmaPipeline.__call__."""
        return self.unpacked(latent_BSC, geometry) / vae.config.scaling_factor

    def schedule(
        self,
        name: ScheduleName,
        scheduler_config: dict[str, Any],
        *,
        steps: int,
        image_tokens: int,
        dtype: "torch.dtype",
    ) -> "Schedule":
        """Of DPMSolverMultistepScheduler. Source: Lu et al., arXiv 2211.01095."""
        from diffusers import DPMSolverMultistepScheduler

        from secondcast.models.schedule import Schedule

        self.check_schedule_name(name)
        _check_scheduler(scheduler_config)
        try:
            scheduler = DPMSolverMultistepScheduler.from_config(scheduler_config)
            scheduler.set_timesteps(steps)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise TeacherError(
                f"the scheduler's configuration is refused by diffusers ({reason(error)}): download scheduler/ again"
            ) from error
        # Of the scheduler: of the noise relative to that of the image.
        ratio_K1 = scheduler.sigmas.double()
        return Schedule(
            sigmas=tuple((ratio_K1 / (1 + ratio_K1**2).sqrt()).tolist()),
            timesteps=tuple(scheduler.timesteps.double().tolist()),
            timestep_dtype=scheduler.timesteps.dtype,
            scheduler=scheduler_config,
        )

    def timestep_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """The scheduler's."""
        import torch

        return torch.int64

    def predicted_clean_latent(self, x_SC: Array, prediction_SC: Array, sigma: float) -> Array:
        """(x_k - sigma_k noise) / alpha_k, of the conditional prediction."""
        alpha = max(_LEAST_ALPHA, (1 - sigma**2) ** 0.5)
        x_SC, noise_SC = (array.astype(np.float32) for array in (x_SC, prediction_SC))
        clean_SC: Array = (x_SC - np.float32(sigma) * noise_SC) / np.float32(alpha)
        return clean_SC

    def call(
        self,
        transformer: Any,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        conditioning: Conditioning,
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, Any]",
    ) -> "torch.Tensor":
        """As PixArtSigmaPipeline.__call__ does, for the given rows: the predicted noise."""
        latents = self.unpacked(hidden_states_BSC, positions["geometry"])
        predicted = transformer(
            latents,
            encoder_hidden_states=encoder_hidden_states_BTD,
            encoder_attention_mask=conditioning[TEXT_MASK],
            timestep=timestep_B,
            added_cond_kwargs=_NO_CONDITIONS,
            return_dict=False,
        )[0]
        return self.packed(predicted[:, : latents.shape[1]])

    def streams(
        self,
        transformer: Any,
        blocks: int,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        conditioning: Conditioning,
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, Any]",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """As PixArtTransformer2DModel.forward begins; the text stream is the projected text, for all blocks."""
        batch = len(hidden_states_BSC)
        image_BSI = transformer.pos_embed(self.unpacked(hidden_states_BSC, positions["geometry"]))
        modulation_BX, _ = transformer.adaln_single(
            timestep_B, _NO_CONDITIONS, batch_size=batch, hidden_dtype=image_BSI.dtype
        )
        text_BTI = transformer.caption_projection(encoder_hidden_states_BTD)
        bias_B1T = ((1 - conditioning[TEXT_MASK].to(image_BSI.dtype)) * -10000.0).unsqueeze(1)
        for block in self.anatomy.blocks(transformer)[:blocks]:
            image_BSI = run_block(
                transformer, block, image_BSI, None, text_BTI, bias_B1T, modulation_BX, None, None
            )  # fmt: skip
        return image_BSI, text_BTI

    def reference_inputs(
        self, conditioning: Conditioning, embedding_BTD: "torch.Tensor", *, negative: bool = False
    ) -> dict[str, Any]:
        """With the mask; a negative embedding takes the place of the negative prompt."""
        if negative:
            mask_BT = conditioning[TEXT_MASK]
            return {
                "negative_prompt": None,
                "negative_prompt_embeds": embedding_BTD,
                "negative_prompt_attention_mask": mask_BT,
            }
        return {"prompt_embeds": embedding_BTD, "prompt_attention_mask": conditioning[TEXT_MASK]}

    def reference_embedding(
        self, folder: Path, text_encoder: Any, texts: Sequence[str], *, text_length: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The pipeline's encode_prompt, zero where its mask is, and the ids of its tokenizer."""
        import diffusers
        import torch

        pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(
            folder, transformer=None, vae=None, text_encoder=text_encoder, local_files_only=True
        )
        ids_BT: torch.Tensor = pipeline.tokenizer(
            self.cleaned(texts), padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            rows_BTD, mask_BT, _, _ = pipeline.encode_prompt(
                list(texts), do_classifier_free_guidance=False, device=text_encoder.device, clean_caption=True,
                max_sequence_length=text_length,
            )  # fmt: skip
        return rows_BTD * mask_BT[..., None].to(rows_BTD.dtype), ids_BT

    def image_size(self, *, height: int, width: int) -> dict[str, int]:
        """Exactly this size, not the nearest one of the pipeline's list."""
        return {"height": height, "width": width, "use_resolution_binning": False}


def _check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise TeacherError for steps that are random, or that mix the values of a latent."""
    expected = {"prediction_type": "epsilon", "thresholding": False, "use_flow_sigmas": False, "variance_type": None}
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise TeacherError(f"the scheduler has {key} = {found!r}, expected {value!r}: it is none of PixArt-Sigma's")
    if str(found := config.get("algorithm_type")).startswith("sde"):
        raise TeacherError(
            f"the scheduler has algorithm_type = {found!r}, expected 'dpmsolver++': its steps are not repeatable"
        )


PIXART_SIGMA = PixArt(
    name="pixart-sigma",
    title="PixArt-Sigma",
    owner="PixArt-alpha",
    licences={"PixArt-Sigma-XL-2-512-MS": OPENRAIL, "PixArt-Sigma-XL-2-1024-MS": OPENRAIL},
    pipeline="PixArtSigmaPipeline",
    parts={
        "transformer": Part(
            folder="transformer",
            key="_class_name",
            kind="PixArtTransformer2DModel",
            # Its name when the models were published; diffusers loads one as the other.
            also=("Transformer2DModel",),
            needs=(
                "in_channels",
                "patch_size",
                "sample_size",
                "caption_channels",
                "attention_head_dim",
                "num_attention_heads",
                "num_layers",
            ),
        ),
        "scheduler": Part(folder="scheduler", key="_class_name", kind="DPMSolverMultistepScheduler"),
        "large_text_encoder": t5_part("text_encoder"),
        "large_tokenizer": Part(folder="tokenizer"),
        "vae": Part(
            folder="vae",
            key="_class_name",
            kind="AutoencoderKL",
            needs=("block_out_channels", "latent_channels", "scaling_factor"),
        ),
    },
    # PixArtSigmaPipeline.__call__ of diffusers.
    text_length=300,
    largest_text_length=300,
    latent_rule="scheduler",
    anatomy=Anatomy(
        block_lists=(BlockList(attribute="transformer_blocks", count_key="num_layers"),),
        modulation=(),
        conditioning="adaln_single",
        text_entry="caption_projection.linear_1.weight",
        head=("proj_out",),
        cross_attention=True,
    ),
    pooled=("zero",),
    guidance_rule="cfg",
    guidance="3.0:6.0:0.5",
    attention_backends=False,
    masks_text=True,
    text_cleaning="clean-caption",
)
