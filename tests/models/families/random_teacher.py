"""Random teachers in the FluxPipeline layout, made on the spot: real classes, tiny sizes."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "bench",
    "car",
    "dog",
    "cat",
    "on",
    "the",
    "left",
    "of",
    "right",
    "and",
    "sign",
    "that",
    "says",
    "two",
    "three",
]

DEV_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL_SCHEDULER = {**DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}


def make_teacher(folder: Path, *, seed: int = 0, guidance: bool = True, **changes: Any) -> Path:
    """Write a random teacher; `changes` replace entries of the transformer's or the T5's configuration.

    pipeline: the class of diffusers that saves it.
    """
    torch.manual_seed(seed)
    pipeline_class = changes.pop("pipeline", FluxPipeline)
    tokenizer = t5_tokenizer(changes.pop("text_length", 12))
    transformer_config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 8,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }
    text_config = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    for config in (transformer_config, text_config):
        config.update({key: changes.pop(key) for key in list(changes) if key in config})
    vae_config = {"block_out_channels": (8, 8), "sample_size": 16, **changes}
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(DEV_SCHEDULER if guidance else SCHNELL_SCHEDULER),
        vae=random_vae(int(transformer_config["in_channels"]) // 4, **vae_config),
        text_encoder=_clip(int(transformer_config["pooled_projection_dim"])),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                **text_config,
            )
        ),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(**transformer_config),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_vae(channels: int, **config: Any) -> AutoencoderKL:
    blocks = len(config["block_out_channels"])
    return AutoencoderKL(
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def _clip(width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    source = folder.parent / f"{folder.name}-clip"
    source.mkdir(parents=True)
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"), model_max_length=16)


def t5_tokenizer(text_length: int) -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(piece, -8.0) for piece in ("▁", *string.ascii_letters, *string.digits, *".,'!?-")]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=text_length)
