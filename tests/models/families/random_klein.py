"""A random teacher in the layout of Flux2KleinPipeline: real classes, tiny sizes."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.models.families.random_teacher import DEV_SCHEDULER

# Tokens of the template around a text of one letter, and of longer texts.
TEXT_LENGTH = 28
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# As that of Qwen3 for one message of a user.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LAYERS = 29
SIZE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def make_klein(folder: Path, *, seed: int = 0, text_length: int = TEXT_LENGTH, **transformer: Any) -> Path:
    """Write a random teacher; `transformer` replaces entries of the transformer's configuration."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(text_length)
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    # Statistics that leave nothing as it is.
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(DEV_SCHEDULER),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen_config(len(tokenizer), LAYERS, 8)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**config | transformer),
        is_distilled=True,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_qwen_config(folder: Path, vocabulary: int, *, layers: int = 1, width: int = 16) -> Path:
    """Write the configuration of a small Qwen3, from which a student with random weights is made."""
    qwen_config(vocabulary, layers, width).save_pretrained(folder)
    return folder


def vocabulary_of(teacher: Path) -> int:
    """Number of tokens of a teacher's text encoder."""
    return int(json.loads((teacher / "text_encoder/config.json").read_bytes())["vocab_size"])


def qwen_config(vocabulary: int, layers: int, width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **SIZE,
    )  # fmt: skip


def qwen_tokenizer(text_length: int) -> Qwen2TokenizerFast:
    letters = ["Ġ", "Ċ", *string.ascii_letters, *string.digits, *string.punctuation]
    words = ["Ġa", "re", "red", "us", "er", "user", "ĊĊ", "as", "ass"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *letters, *words]))}
    merges = [
        ("Ġ", "a"), ("r", "e"), ("re", "d"), ("u", "s"), ("e", "r"), ("us", "er"), ("Ċ", "Ċ"), ("a", "s"), ("as", "s"),
    ]  # fmt: skip
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, merges=merges, additional_special_tokens=list(SPECIAL[1:]), model_max_length=text_length
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
