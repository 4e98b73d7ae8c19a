"""The networks of the pocket teacher, untrained, and the FluxPipeline folder that holds them."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from secondcast.pocket.training.text import pieces
from secondcast.pocket.world import IMAGE_SIZE

TEXT_LENGTH: int = 24
"""Text tokens T of every prompt, padding included; the longest caption of the world has exactly as many."""
TEXT_WIDTH: int = 256
POOLED_WIDTH: int = 32
POOLED_LENGTH: int = 128
LATENT_CHANNELS: int = 8


def make_tokenizer() -> T5TokenizerFast:
    """The T5 tokenizer: unigram pieces written down in `secondcast.pocket.training.text`, no sentinels."""
    return T5TokenizerFast(vocab=pieces(), extra_ids=0, model_max_length=TEXT_LENGTH)


def make_text_encoder() -> T5EncoderModel:
    """The T5 encoder, 4 layers, twice as wide as the transformer that reads it."""
    config = T5Config(
        vocab_size=len(pieces()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=384,
        num_layers=4,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def make_pooled_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single bytes; nothing depends on it, since the pooled embedding is zero."""
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=POOLED_LENGTH)


def make_pooled_encoder() -> CLIPTextModel:
    """A CLIP text model whose last layer norm is zero, so that the pooled embedding is exactly zero."""
    tokens = len(make_pooled_tokenizer())
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=POOLED_WIDTH,
        intermediate_size=POOLED_WIDTH,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POOLED_LENGTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    model = CLIPTextModel(config)
    last = [module for name, module in model.named_modules() if name.endswith("final_layer_norm")][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model


def make_autoencoder() -> AutoencoderKL:
    """The VAE: half the image's size, 8 channels, so that one image token covers 4 x 4 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def make_transformer() -> FluxTransformer2DModel:
    """The FLUX transformer: 2 double and 2 single blocks, 4 heads of 32; modulation and output start at zero."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(
            ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's scheduler; the shift grows from 16 image tokens to 64, the pocket has 36 (mu 0.77)."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=16,
        max_image_seq_len=64,
    )


def save_pipeline(
    folder: Path, *, text_encoder: T5EncoderModel, vae: AutoencoderKL, transformer: FluxTransformer2DModel
) -> list[Path]:
    """Write a FluxPipeline folder in bfloat16 and return its weight files, readable by all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooled_encoder = make_pooled_encoder()
    parts = (pooled_encoder, text_encoder, vae, transformer)
    pipeline = FluxPipeline(
        scheduler=make_scheduler(),
        tokenizer=make_pooled_tokenizer(),
        tokenizer_2=make_tokenizer(),
        **dict(zip(("text_encoder", "text_encoder_2", "vae", "transformer"), parts, strict=True)),
    ).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    weights = sorted(folder.glob("*/*.safetensors"))
    for path in weights:
        # safetensors writes files that only their owner can read.
        path.chmod((folder / "model_index.json").stat().st_mode & 0o777)
    return weights
