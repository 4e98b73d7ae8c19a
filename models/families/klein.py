"""FLUX.2-klein."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.models.families.anatomy import Anatomy, BlockList, run_block
from secondcast.models.families.encoders.interface import Conditioning, TextTokenizer
from secondcast.models.families.family import Family, Part
from secondcast.models.families.flow_match import linear_schedule
from secondcast.models.families.licences import APACHE, own_licence
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.recording import ScheduleName

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry
    from secondcast.models.schedule import Schedule
    from secondcast.models.weights.files import CheckpointSource

# Flux2KleinPipeline.__call__ of diffusers: text_encoder_out_layers.
_LAYERS = (9, 18, 27)


class Klein(Family):
    """FLUX.2-klein as Flux2KleinPipeline calls it without an image. See Family for each method.

    The chat template is applied to each text. Three hidden layers of a language model, side by side, are its embedding.
    Text tokens have positions. The language model does not read padding, but the transformer reads its rows.
    """

    def check_index(self, index: Mapping[str, Any], file: str) -> None:
        """Refuse the base models, which are sampled with classifier-free guidance in two calls."""
        if not index.get("is_distilled"):
            raise TeacherError(
                f"{file} has is_distilled = {index.get('is_distilled')}, expected true: a base model is sampled with "
                f"classifier-free guidance in two calls, which is not supported; give {' or '.join(self.models)}"
            )

    def check_text_encoder(self, config: Mapping[str, Any], file: str) -> None:
        """Refuse one with fewer layers than are read."""
        for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
            if not isinstance(config[key], int):
                raise TeacherError(f"{file} has {key} = {config[key]!r}, expected a number: download it again")
        if (found := config["num_hidden_layers"]) < max(_LAYERS):
            raise TeacherError(
                f"{file} has num_hidden_layers = {found}, expected at least {max(_LAYERS)}, the deepest layer that "
                f"{self.pipeline} reads: give {' or '.join(self.models)}"
            )

    def check_transformer(self, config: Mapping[str, Any], file: str) -> None:
        """Refuse those with a guidance scale (FLUX.2-dev), and those that predict something besides the velocity."""
        taken, given = config["in_channels"], config.get("out_channels")
        if config["guidance_embeds"] or given not in (None, taken):
            raise TeacherError(
                f"{file} has guidance_embeds = {config['guidance_embeds']}, in_channels = {taken} and out_channels = "
                f"{given}, expected false and equal numbers: it is none of {', '.join(self.models)}; give one of them"
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
            "guidance_embeds": False,
            "axes_dims_rope": tuple(config["axes_dims_rope"]),
        }

    def text_width(self, config: Mapping[str, Any]) -> int:
        """D is the joint attention's."""
        return int(config["joint_attention_dim"])

    def encoder_width(self, encoder_config: Mapping[str, Any]) -> int:
        """All layers together."""
        width: int = encoder_config["hidden_size"]
        return len(_LAYERS) * width

    def pad_token_id(self, encoder_config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> int:
        """That of the tokenizer: the language model has none."""
        try:
            config = json.loads(tokenizer_files["tokenizer_config.json"])
            padding = config["pad_token"]
            text = padding["content"] if isinstance(padding, dict) else padding
            added = {entry["content"]: int(number) for number, entry in config.get("added_tokens_decoder", {}).items()}
            if text not in added:
                # Newer versions of transformers have the added tokens there alone.
                entries = json.loads(tokenizer_files["tokenizer.json"])["added_tokens"]
                added = {entry["content"]: int(entry["id"]) for entry in entries}
            return added[text]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TeacherError(
                f"the files in {self.tokenizer_slot}/ do not state the id of the padding ({type(error).__name__}: "
                f"{error}): download {self.tokenizer_slot}/ again"
            ) from error

    def tokenizer(self, folder: Path) -> TextTokenizer:
        """Qwen's, with its chat template."""
        from secondcast.models.families.encoders.qwen import QwenTokens

        return QwenTokens(folder)

    def load_text_encoder(self, folder: Path, source: "CheckpointSource", dtype: "torch.dtype") -> Any:
        """Qwen3 up to the deepest layer that is read."""
        from secondcast.models.families.encoders.qwen import load_qwen

        return load_qwen(folder, source, _LAYERS, dtype)

    def loaded_name(self, stored: str) -> str | None:
        """That of the language model within the whole, up to the deepest layer that is read."""
        from secondcast.models.families.encoders.qwen import loaded_name

        return loaded_name(stored, _LAYERS)

    def make_text_encoder(self, config: Mapping[str, Any]) -> Any:
        """Qwen3 up to the deepest layer that is read."""
        from secondcast.models.families.encoders.qwen import make_qwen

        return make_qwen(config, _LAYERS)

    def encode(self, text_encoder: Any, token_ids_BT: "torch.Tensor", pad_token_id: int) -> "torch.Tensor":
        """The layers side by side, rows of padding included."""
        from secondcast.models.families.encoders.qwen import encode_with_qwen

        return encode_with_qwen(text_encoder, token_ids_BT, _LAYERS, pad_token_id)

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C is what the transformer reads."""
        return int(config["in_channels"])

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """The models are distilled to sample without."""
        return False

    def vae_input(self, latent_BSC: "torch.Tensor", geometry: "Geometry", vae: Any) -> "torch.Tensor":
        """With the mean and variance of the VAE's batch norm, then unpacked. Source: Flux2KleinPipeline.__call__."""
        import torch
        from diffusers import Flux2KleinPipeline

        latents = self.unpacked(latent_BSC, geometry)
        mean, variance = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        unpatched: torch.Tensor = Flux2KleinPipeline._unpatchify_latents(latents)
        return unpatched

    def schedule(
        self,
        name: ScheduleName,
        scheduler_config: dict[str, Any],
        *,
        steps: int,
        image_tokens: int,
        dtype: "torch.dtype",
    ) -> "Schedule":
        """Linear sigmas, shifted by the numbers of image tokens and steps. Source: Flux2KleinPipeline.__call__."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        self.check_schedule_name(name)
        mu = compute_empirical_mu(image_seq_len=image_tokens, num_steps=steps)
        return linear_schedule(scheduler_config, steps=steps, mu=mu, own_sigmas=False, dtype=dtype)

    def positions(
        self, geometry: "Geometry", text_length: int, *, device: "torch.device", dtype: "torch.dtype"
    ) -> "dict[str, torch.Tensor]":
        """txt_ids_T4, the last of which counts the text tokens, and img_ids_S4, with row and column of each token."""
        import torch

        one = torch.zeros(1, dtype=torch.int64)
        rows, columns, tokens = (torch.arange(count) for count in (geometry.rows, geometry.columns, text_length))
        return {
            "txt_ids": torch.cartesian_prod(one, one, one, tokens).to(device),
            "img_ids": torch.cartesian_prod(one, rows, columns, one).to(device),
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
        """As Flux2KleinPipeline.__call__ does."""
        velocity_BSC: torch.Tensor = transformer(
            hidden_states=hidden_states_BSC,
            timestep=timestep_B,
            guidance=None,
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
        """As Flux2Transformer2DModel.forward begins."""
        import torch

        double = list(transformer.transformer_blocks)[:blocks]
        single = list(transformer.single_transformer_blocks)[: max(0, blocks - len(transformer.transformer_blocks))]
        image_BSI = transformer.x_embedder(hidden_states_BSC)
        embedded_BI = transformer.time_guidance_embed(timestep_B.to(image_BSI.dtype) * 1000, None)
        of_image, of_text = (
            modulation(embedded_BI)
            for modulation in (transformer.double_stream_modulation_img, transformer.double_stream_modulation_txt)
        )
        text_BTI = transformer.context_embedder(encoder_hidden_states_BTD)
        parts = [transformer.pos_embed(positions[name]) for name in ("txt_ids", "img_ids")]
        rotary = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        for block in double:
            text_BTI, image_BSI = run_block(transformer, block, image_BSI, text_BTI, of_image, of_text, rotary, None)
        if not single:
            return image_BSI, text_BTI
        of_all, tokens = transformer.single_stream_modulation(embedded_BI), text_BTI.shape[1]
        both = torch.cat([text_BTI, image_BSI], dim=1)
        for block in single:
            both = run_block(transformer, block, both, None, of_all, rotary, None)
        return both[:, tokens:], both[:, :tokens]

    def reference(self, transformer: Any, scheduler_config: dict[str, Any], vae_config: dict[str, Any]) -> Any:
        """With a batch norm that has memory."""
        pipeline = super().reference(transformer, scheduler_config, vae_config)
        # At the end the pipeline scales what `final_latents` does not take.
        pipeline.vae.bn.to_empty(device="cpu")
        return pipeline

    def reference_inputs(
        self, conditioning: Conditioning, embedding_BTD: "torch.Tensor", *, negative: bool = False
    ) -> dict[str, Any]:
        """The embedding alone."""
        return {"prompt_embeds": embedding_BTD}

    def final_latents(self, pipeline: Any, **call: Any) -> "torch.Tensor":
        """Of the last step: what the pipeline gives as latents is scaled for the VAE."""
        last: dict[str, torch.Tensor] = {}

        def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last["latents"] = tensors["latents"]
            return {}

        pipeline(**call, output_type="latent", callback_on_step_end=keep)
        return last["latents"]

    def reference_embedding(
        self, folder: Path, text_encoder: Any, texts: Sequence[str], *, text_length: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """By the pipeline's encode_prompt; the ids are those with which it calls the text encoder."""
        import diffusers
        import torch

        pipeline = diffusers.Flux2KleinPipeline.from_pretrained(
            folder, transformer=None, vae=None, text_encoder=text_encoder, local_files_only=True
        )
        seen: list[torch.Tensor] = []
        hook = text_encoder.register_forward_pre_hook(
            lambda _, given, named: seen.append(named["input_ids"]), with_kwargs=True
        )
        try:
            with torch.no_grad():
                embedding_BTD, _ = pipeline.encode_prompt(
                    list(texts), device=text_encoder.device, max_sequence_length=text_length
                )
        finally:
            hook.remove()
        return embedding_BTD, seen[0].cpu()

    def unpacked(self, latent_BSC: "torch.Tensor", geometry: "Geometry") -> "torch.Tensor":
        """[B, C, rows, columns]."""
        return latent_BSC.transpose(1, 2).unflatten(2, (geometry.rows, geometry.columns))

    def packed(self, latent: "torch.Tensor") -> "torch.Tensor":
        """[B, S, C]."""
        return latent.flatten(2).transpose(1, 2)


KLEIN = Klein(
    name="flux2-klein",
    title="FLUX.2-klein",
    owner="black-forest-labs",
    licences={
        "FLUX.2-klein-4B": APACHE,
        "FLUX.2-klein-9B": own_licence(
            "flux-non-commercial-license", "black-forest-labs/FLUX.2-klein-9B", non_commercial=True
        ),
    },
    pipeline="Flux2KleinPipeline",
    pipeline_options={"is_distilled": True},
    parts={
        "transformer": Part(
            folder="transformer",
            key="_class_name",
            kind="Flux2Transformer2DModel",
            needs=(
                "in_channels",
                "guidance_embeds",
                "joint_attention_dim",
                "attention_head_dim",
                "num_attention_heads",
                "num_layers",
                "num_single_layers",
                "axes_dims_rope",
            ),
        ),
        "scheduler": Part(folder="scheduler", key="_class_name", kind="FlowMatchEulerDiscreteScheduler"),
        "large_text_encoder": Part(
            folder="text_encoder",
            key="model_type",
            kind="qwen3",
            needs=("hidden_size", "num_hidden_layers", "vocab_size"),
            loaded_as="Qwen3ForCausalLM",
        ),
        "large_tokenizer": Part(folder="tokenizer"),
        "vae": Part(
            folder="vae",
            key="_class_name",
            kind="AutoencoderKLFlux2",
            needs=("block_out_channels", "latent_channels", "batch_norm_eps"),
        ),
    },
    # A quarter of the pipeline's: an embedding of 512 tokens of this width would be several times a trajectory.
    text_length=128,
    # Flux2KleinPipeline.__call__ of diffusers.
    largest_text_length=512,
    latent_rule="flow-match-euler",
    anatomy=Anatomy(
        block_lists=(
            BlockList(attribute="transformer_blocks", count_key="num_layers"),
            BlockList(attribute="single_transformer_blocks", count_key="num_single_layers"),
        ),
        modulation=(),
        conditioning="time_guidance_embed",
        text_entry="context_embedder.weight",
        head=("norm_out", "proj_out"),
    ),
    pooled=("zero",),
    guidance_rule="none",
    text_layers=_LAYERS,
    student="Qwen/Qwen3-0.6B",
    tokenizer_files=(
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "chat_template.jinja"),
    ),
)
