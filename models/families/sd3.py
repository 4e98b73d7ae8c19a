"""Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.models.families.anatomy import Anatomy, BlockList, run_block
from secondcast.models.families.encoders.interface import CLIP_ROWS, Conditioning, ConditioningEncoder
from secondcast.models.families.family import POOLED, Part, Role
from secondcast.models.families.flow_match import check_repeatable
from secondcast.models.families.licences import own_licence
from secondcast.models.families.patches import PatchedLatents
from secondcast.models.families.reads_t5 import t5_part
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.manifest import ConditioningArray
from secondcast.storage_schemas.schema.recording import ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule


class StableDiffusion3(PatchedLatents):
    """SD3 as StableDiffusion3Pipeline calls it: the rows of two CLIPs, padded to T5's width, before those of T5.

    The student replaces T5's rows. An image token of a cache is what the transformer makes one of: 2 x 2 latents.
    """

    def check_transformer(self, config: Mapping[str, Any], file: str) -> None:
        """Refuse those that predict something besides the velocity."""
        taken, given = config["in_channels"], config.get("out_channels")
        if given not in (None, taken):
            raise TeacherError(
                f"{file} has in_channels = {taken} and out_channels = {given}, expected equal numbers: it is none of "
                f"{', '.join(self.models)}; give one of them"
            )
        self.check_patches(config, file)

    def longest_side(self, config: Mapping[str, Any]) -> int:
        """As many as it has embeddings of positions."""
        return int(config["pos_embed_max_size"])

    def text_width(self, config: Mapping[str, Any]) -> int:
        """D is the joint attention's."""
        return int(config["joint_attention_dim"])

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P is that of the pooled outputs of both CLIPs."""
        return int(config["pooled_projection_dim"])

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """By classifier-free guidance."""
        return True

    def conditioning_arrays(self, clip_configs: Sequence[Mapping[str, Any]]) -> tuple[ConditioningArray, ...]:
        """The second-last layers of both CLIPs, side by side."""
        rows = int(clip_configs[0]["max_position_embeddings"])
        width = sum(int(config["hidden_size"]) for config in clip_configs)
        return (ConditioningArray(name=CLIP_ROWS, letters="LW", shape=(rows, width)),)

    def pooled_outputs(self, clip_configs: Sequence[Mapping[str, Any]]) -> int:
        """The projected outputs of both CLIPs, side by side."""
        return sum(int(config["projection_dim"]) for config in clip_configs)

    def conditioning_encoder(
        self, folders: Mapping[Role, Path], *, dtype: "torch.dtype", device: "torch.device"
    ) -> ConditioningEncoder:
        """Both CLIPs."""
        from transformers import CLIPTextModelWithProjection

        from secondcast.models.families.encoders.clip import ClipPair, load_clip

        pairs = [
            load_clip(CLIPTextModelWithProjection, folders[model], folders[tokenizer], dtype, device)
            for model, tokenizer in self.conditioning_roles
        ]
        return ClipPair([model for model, _ in pairs], [tokenizer for _, tokenizer in pairs])

    def vae_input(self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae: Any) -> "torch.Tensor":
        """Unpacked, then scaled and shifted. Source: StableDiffusion3Pipeline.__call__."""
        latents = self.unpacked(latent_BSC, geometry)
        return latents / vae.config.scaling_factor + vae.config.shift_factor

    def schedule(
        self,
        name: ScheduleName,
        scheduler_config: dict[str, Any],
        *,
        steps: int,
        image_tokens: int,
        dtype: "torch.dtype",
    ) -> "Schedule":
        """The scheduler's own sigmas; timesteps from 1000 to 0 in fp32. Source: StableDiffusion3Pipeline.__call__."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        from secondcast.models.schedule import Schedule

        self.check_schedule_name(name)
        check_repeatable(scheduler_config)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        moved: dict[str, float] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.16}
            values = [scheduler.config.get(key, usual) for key, usual in names.items()]
            moved["mu"] = calculate_shift(image_tokens, *values)
        scheduler.set_timesteps(steps, **moved)
        return Schedule(
            sigmas=tuple(scheduler.sigmas.double().tolist()),
            timesteps=tuple(scheduler.timesteps.double().tolist()),
            timestep_dtype=scheduler.timesteps.dtype,
        )

    def timestep_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """The scheduler's, whatever the dtype of the latents."""
        import torch

        return torch.float32

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
        """As StableDiffusion3Pipeline.__call__ does, for the given rows."""
        velocity = transformer(
            hidden_states=self.unpacked(hidden_states_BSC, positions["geometry"]),
            timestep=timestep_B,
            encoder_hidden_states=_text_rows(conditioning, encoder_hidden_states_BTD),
            pooled_projections=conditioning[POOLED],
            return_dict=False,
        )[0]
        return self.packed(velocity)

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
        """As SD3Transformer2DModel.forward begins."""
        image_BSI = transformer.pos_embed(self.unpacked(hidden_states_BSC, positions["geometry"])).contiguous()
        embedded_BI = self.embedded_conditions(transformer.time_text_embed, timestep_B, None, conditioning[POOLED])
        text_BTI = transformer.context_embedder(_text_rows(conditioning, encoder_hidden_states_BTD))
        for block in self.anatomy.blocks(transformer)[:blocks]:
            found = run_block(transformer, block, image_BSI, text_BTI, embedded_BI)
            # The last block of the transformer gives no text.
            text_BTI, image_BSI = found[0] if found[0] is not None else text_BTI, found[1]
        return image_BSI, text_BTI

    def embedded_conditions(
        self,
        embed: "torch.nn.Module",
        timestep_B: "torch.Tensor",
        guidance_B: "torch.Tensor | None",
        pooled_projections_BP: "torch.Tensor",
    ) -> "torch.Tensor":
        """Of timestep and pooled vector."""
        embedded_BI: torch.Tensor = embed(timestep_B, pooled_projections_BP)
        return embedded_BI

    def reference_inputs(
        self, conditioning: Conditioning, embedding_BTD: "torch.Tensor", *, negative: bool = False
    ) -> dict[str, Any]:
        """The rows of CLIP and T5 are one argument."""
        return super().reference_inputs(conditioning, _text_rows(conditioning, embedding_BTD), negative=negative)

    def reference_embedding(
        self, folder: Path, text_encoder: Any, texts: Sequence[str], *, text_length: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """T5's rows of the pipeline's encode_prompt, and the ids of its tokenizer."""
        import diffusers
        import torch

        pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
            folder,
            transformer=None,
            vae=None,
            text_encoder_3=text_encoder,
            torch_dtype=text_encoder.dtype,
            local_files_only=True,
        )
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.to(text_encoder.device)
        ids_BT: torch.Tensor = pipeline.tokenizer_3(
            list(texts), padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            rows_BTD: torch.Tensor = pipeline.encode_prompt(
                list(texts), None, None, do_classifier_free_guidance=False, device=text_encoder.device,
                max_sequence_length=text_length,
            )[0]  # fmt: skip
        return rows_BTD[:, -text_length:], ids_BT


def _text_rows(conditioning: Conditioning, embedding_BTD: "torch.Tensor") -> "torch.Tensor":
    """CLIP's rows, padded with zeros to T5's width, and then T5's."""
    import torch

    clip_BLW = conditioning[CLIP_ROWS]
    padded_BLD = torch.nn.functional.pad(clip_BLW, (0, embedding_BTD.shape[-1] - clip_BLW.shape[-1]))
    return torch.cat([padded_BLD, embedding_BTD], dim=-2)


_CLIP: dict[str, Any] = {
    "key": "model_type",
    "kind": "clip_text_model",
    "needs": ("hidden_size", "projection_dim", "max_position_embeddings"),
    "loaded_as": "CLIPTextModelWithProjection",
}
SD3 = StableDiffusion3(
    name="sd3",
    title="Stable Diffusion 3",
    owner="stabilityai",
    licences={
        model: own_licence("stabilityai-ai-community", f"stabilityai/{model}")
        for model in (
            "stable-diffusion-3-medium-diffusers",
            "stable-diffusion-3.5-medium",
            "stable-diffusion-3.5-large",
        )
    },
    pipeline="StableDiffusion3Pipeline",
    parts={
        "transformer": Part(
            folder="transformer",
            key="_class_name",
            kind="SD3Transformer2DModel",
            needs=(
                "in_channels",
                "patch_size",
                "pos_embed_max_size",
                "joint_attention_dim",
                "pooled_projection_dim",
                "attention_head_dim",
                "num_attention_heads",
                "num_layers",
            ),
        ),
        "scheduler": Part(folder="scheduler", key="_class_name", kind="FlowMatchEulerDiscreteScheduler"),
        "large_text_encoder": t5_part("text_encoder_3"),
        "large_tokenizer": Part(folder="tokenizer_3"),
        "pooled_text_encoder": Part(folder="text_encoder", **_CLIP),
        "pooled_tokenizer": Part(folder="tokenizer"),
        "second_pooled_text_encoder": Part(folder="text_encoder_2", **_CLIP),
        "second_pooled_tokenizer": Part(folder="tokenizer_2"),
        "vae": Part(
            folder="vae",
            key="_class_name",
            kind="AutoencoderKL",
            needs=("block_out_channels", "latent_channels", "scaling_factor", "shift_factor"),
        ),
    },
    text_length=77,
    # StableDiffusion3Pipeline.check_inputs of diffusers.
    largest_text_length=512,
    latent_rule="flow-match-euler",
    anatomy=Anatomy(
        block_lists=(BlockList(attribute="transformer_blocks", count_key="num_layers"),),
        modulation=("norm1.linear", "norm1_context.linear", "norm_out.linear"),
        conditioning="time_text_embed",
        text_entry="context_embedder.weight",
        head=("norm_out", "proj_out"),
        last_differs=True,
    ),
    pooled=("clip",),
    guidance_rule="cfg",
    guidance="3.0:7.0:0.5",
    attention_backends=False,
)
