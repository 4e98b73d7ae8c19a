"""FLUX.1: dev, schnell, Krea, and Kontext without an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.models.families.anatomy import Anatomy, BlockList, run_block
from secondcast.models.families.encoders.interface import Conditioning, ConditioningEncoder
from secondcast.models.families.family import LATENTS_PER_SIDE, POOLED, Part, Role
from secondcast.models.families.flow_match import PlannedSchedule, flow_match_schedule, linear_schedule
from secondcast.models.families.licences import APACHE, Licence, own_licence
from secondcast.models.families.reads_t5 import ReadsT5, t5_part
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.recording import Dtype, ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule


class Flux(ReadsT5):
    """FLUX.1 as FluxPipeline calls it: no attention mask, all text positions 0. See Family for each method."""

    def check_transformer(self, config: Mapping[str, Any], file: str) -> None:
        """Refuse those that read an image in addition to the latent (Fill, Canny, Depth)."""
        taken, given = config["in_channels"], config.get("out_channels")
        if given not in (None, taken):
            raise TeacherError(
                f"{file} has in_channels = {taken} and out_channels = {given}, expected equal numbers: it reads an "
                f"image in addition to the latent (Fill, Canny, Depth); give {' or '.join(self.models)}, which do not"
            )

    def tiny_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """One head, one block of each kind."""
        return {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": config["attention_head_dim"],
            "num_attention_heads": 1,
            "joint_attention_dim": 4,
            "pooled_projection_dim": 4,
            "axes_dims_rope": tuple(config["axes_dims_rope"]),
        }

    def text_width(self, config: Mapping[str, Any]) -> int:
        """D is the joint attention's."""
        return int(config["joint_attention_dim"])

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P is that of CLIP's pooled output."""
        return int(config["pooled_projection_dim"])

    def pooled_outputs(self, clip_configs: Sequence[Mapping[str, Any]]) -> int:
        """That of CLIP."""
        return int(clip_configs[0]["hidden_size"])

    def conditioning_encoder(
        self, folders: Mapping[Role, Path], *, dtype: "torch.dtype", device: "torch.device"
    ) -> ConditioningEncoder:
        """CLIP."""
        from transformers import CLIPTextModel

        from secondcast.models.families.encoders.clip import PooledClip, load_clip

        clip = folders["pooled_text_encoder"], folders["pooled_tokenizer"]
        return PooledClip(*load_clip(CLIPTextModel, *clip, dtype, device))

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C is what the transformer reads."""
        return int(config["in_channels"])

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """FLUX.1-dev does, schnell does not."""
        return bool(config["guidance_embeds"])

    def vae_input(self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae: Any) -> "torch.Tensor":
        """Unpacked, then scaled and shifted. Source: FluxPipeline.__call__."""
        from diffusers import FluxPipeline

        scale = self.token_px(vae.config) // LATENTS_PER_SIDE
        latents: torch.Tensor = FluxPipeline._unpack_latents(latent_BSC, geometry.height, geometry.width, scale)
        return latents / vae.config.scaling_factor + vae.config.shift_factor

    def vae_output(self, latents: "torch.Tensor", vae: Any) -> "torch.Tensor":
        """Shifted and scaled, then packed. Source: FluxControlNetPipeline.__call__."""
        from diffusers import FluxPipeline

        scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed_BSC: torch.Tensor = FluxPipeline._pack_latents(scaled, *scaled.shape)
        return packed_BSC

    def schedule(
        self,
        name: ScheduleName,
        scheduler_config: dict[str, Any],
        *,
        steps: int,
        image_tokens: int,
        dtype: "torch.dtype",
    ) -> "Schedule":
        """Of FluxPipeline ("diffusers"): linear sigmas, shifted according to the number of image tokens.

        "distillt5": that of the paper's script, `set_timesteps(steps, mu=mu)`, with the scheduler's own sigmas. Assumes
        that the script passes timesteps as FluxPipeline does, computes mu from the image tokens, and steps with the
        same scheduler.

        Source: FluxPipeline.__call__ and diffusers' FlowMatchEulerDiscreteScheduler, which computes the values; the
        training script of DistillT5.
        """
        mu = shift_of(scheduler_config, image_tokens)
        return linear_schedule(scheduler_config, steps=steps, mu=mu, own_sigmas=name == "distillt5", dtype=dtype)

    def planned_schedule(
        self, name: ScheduleName, scheduler_config: dict[str, Any], *, steps: int, image_tokens: int, dtype: Dtype
    ) -> PlannedSchedule:
        """Without torch if the scheduler has FLUX.1's options."""
        mu = shift_of(scheduler_config, image_tokens)
        own = name == "distillt5"
        found = flow_match_schedule(scheduler_config, steps=steps, mu=mu, own_sigmas=own, dtype=dtype)
        if found is not None:
            return found
        return super().planned_schedule(name, scheduler_config, steps=steps, image_tokens=image_tokens, dtype=dtype)

    def positions(
        self, geometry: "Geometry", text_length: int, *, device: "torch.device", dtype: "torch.dtype"
    ) -> "dict[str, torch.Tensor]":
        """txt_ids_T3, all zero, and img_ids_S3, with row and column of each token."""
        import torch

        ids = torch.zeros(geometry.rows, geometry.columns, 3)
        ids[..., 1] += torch.arange(geometry.rows)[:, None]
        ids[..., 2] += torch.arange(geometry.columns)[None, :]
        return {
            "txt_ids": torch.zeros(text_length, 3, device=device, dtype=dtype),
            "img_ids": ids.reshape(geometry.image_tokens, 3).to(device=device, dtype=dtype),
        }

    def call(
        self,
        transformer: Any,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        conditioning: Conditioning,
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, torch.Tensor]",
    ) -> "torch.Tensor":
        """As FluxPipeline.__call__ does."""
        velocity_BSC: torch.Tensor = transformer(
            hidden_states=hidden_states_BSC,
            timestep=timestep_B,
            guidance=guidance_B,
            pooled_projections=conditioning[POOLED],
            encoder_hidden_states=encoder_hidden_states_BTD,
            return_dict=False,
            **positions,
        )[0]
        return velocity_BSC

    def streams(
        self,
        transformer: Any,
        blocks: int,
        hidden_states_BSC: "torch.Tensor",
        encoder_hidden_states_BTD: "torch.Tensor",
        conditioning: Conditioning,
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        positions: "Mapping[str, torch.Tensor]",
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """As FluxTransformer2DModel.forward begins."""
        import torch

        image_BSI = transformer.x_embedder(hidden_states_BSC)
        conditions = (timestep_B.to(image_BSI.dtype), None if guidance_B is None else guidance_B.to(image_BSI.dtype))
        embedded_BI = self.embedded_conditions(transformer.time_text_embed, *conditions, conditioning[POOLED])
        text_BTI = transformer.context_embedder(encoder_hidden_states_BTD)
        rotary = transformer.pos_embed(torch.cat([positions["txt_ids"], positions["img_ids"]]))
        for block in self.anatomy.blocks(transformer)[:blocks]:
            # In the order of the arguments of both kinds of blocks.
            text_BTI, image_BSI = run_block(transformer, block, image_BSI, text_BTI, embedded_BI, rotary)
        return image_BSI, text_BTI

    def embedded_conditions(
        self,
        embed: "torch.nn.Module",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        pooled_projections_BP: "torch.Tensor",
    ) -> "torch.Tensor":
        """Timestep and guidance are multiplied by 1000 first."""
        # Times 1000 in the transformer's dtype, as in FluxTransformer2DModel.forward.
        scaled = [1000 * value_B for value_B in (timestep_B, guidance_B) if value_B is not None]
        embedded_BI: torch.Tensor = embed(*scaled, pooled_projections_BP)
        return embedded_BI

    def reference_embedding(
        self, folder: Path, text_encoder: Any, texts: Sequence[str], *, text_length: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """By the pipeline's encode_prompt and its tokenizer."""
        import diffusers
        import torch

        pipeline = getattr(diffusers, self.pipeline).from_pretrained(
            folder,
            transformer=None,
            vae=None,
            text_encoder_2=text_encoder,
            local_files_only=True,
        )
        pipeline.text_encoder.to(text_encoder.device)
        ids_BT: torch.Tensor = pipeline.tokenizer_2(
            list(texts), padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            embedding_BTD: torch.Tensor = pipeline.encode_prompt(
                list(texts), None, device=text_encoder.device, max_sequence_length=text_length
            )[0]
        return embedding_BTD, ids_BT


class FluxKontext(Flux):
    """FLUX.1 Kontext, text to image: FluxKontextPipeline without an image calls the transformer as FluxPipeline."""

    def image_size(self, *, height: int, width: int) -> dict[str, int]:
        """The pipeline scales an image size to `max_area`, by default 1024 x 1024."""
        return {"height": height, "width": width, "max_area": height * width}


def shift_of(scheduler_config: dict[str, Any], image_tokens: int) -> float:
    """`mu` of a scheduler, linear in the number of image tokens.

    Same as FluxPipeline's calculate_shift, without importing the pipeline, which takes seconds.
    """
    fewest, most = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
    low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return float(image_tokens * slope + (low - slope * fewest))


def _dev_licence(model: str) -> Licence:
    return own_licence("flux-1-dev-non-commercial-license", f"black-forest-labs/{model}", non_commercial=True)


_SHARED: dict[str, Any] = {
    "owner": "black-forest-labs",
    "parts": {
        "transformer": Part(
            folder="transformer",
            key="_class_name",
            kind="FluxTransformer2DModel",
            needs=(
                "in_channels",
                "guidance_embeds",
                "joint_attention_dim",
                "pooled_projection_dim",
                "attention_head_dim",
                "axes_dims_rope",
            ),
        ),
        "scheduler": Part(folder="scheduler", key="_class_name", kind="FlowMatchEulerDiscreteScheduler"),
        "large_text_encoder": t5_part("text_encoder_2"),
        "large_tokenizer": Part(folder="tokenizer_2"),
        "pooled_text_encoder": Part(
            folder="text_encoder",
            key="model_type",
            kind="clip_text_model",
            needs=("hidden_size",),
            loaded_as="CLIPTextModel",
        ),
        "pooled_tokenizer": Part(folder="tokenizer"),
        "vae": Part(
            folder="vae",
            key="_class_name",
            kind="AutoencoderKL",
            needs=("block_out_channels", "latent_channels", "scaling_factor", "shift_factor"),
        ),
    },
    # The paper's (section 4).
    "text_length": 77,
    # FluxPipeline.check_inputs of diffusers.
    "largest_text_length": 512,
    "latent_rule": "flow-match-euler",
    "anatomy": Anatomy(
        block_lists=(
            BlockList(attribute="transformer_blocks", count_key="num_layers"),
            BlockList(attribute="single_transformer_blocks", count_key="num_single_layers", joint=True),
        ),
        modulation=("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
        conditioning="time_text_embed",
        text_entry="context_embedder.weight",
        head=("norm_out", "proj_out"),
    ),
}
FLUX = Flux(
    name="flux",
    title="FLUX.1",
    licences={
        "FLUX.1-dev": _dev_licence("FLUX.1-dev"),
        "FLUX.1-schnell": APACHE,
        "FLUX.1-Krea-dev": _dev_licence("FLUX.1-Krea-dev"),
    },
    pipeline="FluxPipeline",
    controlnet="FluxControlNetModel",
    **_SHARED,
)
FLUX_KONTEXT = FluxKontext(
    name="flux-kontext",
    title="FLUX.1 Kontext",
    licences={"FLUX.1-Kontext-dev": _dev_licence("FLUX.1-Kontext-dev")},
    pipeline="FluxKontextPipeline",
    **_SHARED,
)
