"""A random teacher in the layout of StableDiffusion3Pipeline: real classes, tiny sizes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.models.families.random_teacher import clip_tokenizer, random_vae, t5_tokenizer

CLIP_WIDTHS = (8, 12)


def make_sd3(folder: Path, *, seed: int = 0, text_length: int = 12, **transformer: Any) -> Path:
    """Write a random teacher; `transformer` replaces entries of the transformer's configuration."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(text_length)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": sum(CLIP_WIDTHS) // 2,
        "pos_embed_max_size": 16,
    }
    text = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    encoder = T5Config(
        vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **text
    )
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random_vae(4, block_out_channels=(8, 8), sample_size=16),
        text_encoder=_clip(CLIP_WIDTHS[0]),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=_clip(CLIP_WIDTHS[1]),
        tokenizer_2=clip_tokenizer(folder.with_name(f"{folder.name}-second")),
        text_encoder_3=T5EncoderModel(encoder),
        tokenizer_3=tokenizer,
        transformer=SD3Transformer2DModel(**config | transformer),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _clip(width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            projection_dim=width // 2,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
