"""A random teacher in the layout of PixArtSigmaPipeline: real classes, tiny sizes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.models.families.random_teacher import random_vae, t5_tokenizer


def make_pixart(folder: Path, *, seed: int = 0, text_length: int = 12, **transformer: Any) -> Path:
    """Write a random teacher; `transformer` replaces entries of the transformer's configuration."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(text_length)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "use_additional_conditions": False,
    }
    text = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    encoder = T5Config(
        vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, **text
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(encoder),
        vae=random_vae(4, block_out_channels=(8, 8), sample_size=16),
        transformer=PixArtTransformer2DModel(**config | transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder
