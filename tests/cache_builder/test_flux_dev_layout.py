"""FLUX.1-dev's own configuration files go the same way: true widths, packing, schedule and 512 px, fewer layers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from secondcast.storage_schemas.reader import Cache
from tests.cache_builder.building import build_cache
from tests.models.families.random_teacher import t5_tokenizer

CONFIGS = Path(__file__).parent / "flux_dev"


def write_reduced(folder: Path) -> None:
    """Random weights for the real configurations; only depth, heads and vocabulary are cut."""
    torch.manual_seed(0)
    shutil.copytree(CONFIGS, folder)
    tokenizer = t5_tokenizer(512)
    tokenizer.save_pretrained(folder / "tokenizer_2")
    reduced = {
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
        "text_encoder_2": {"num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": len(tokenizer)},
    }
    for part, changes in reduced.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    FluxTransformer2DModel.from_config(config).to(torch.bfloat16).save_pretrained(folder / "transformer")
    text_config = T5Config.from_pretrained(folder / "text_encoder_2")
    T5EncoderModel(text_config).to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")


@pytest.mark.slow
def test_flux_devs_configurations_build_a_cache_of_flux_devs_shapes(tmp_path):
    write_reduced(tmp_path / "flux")
    (tmp_path / "p.txt").write_text("a red car\n" + "a dog and a cat " * 40 + "\n")
    build_cache(tmp_path / "c", tmp_path / "flux", tmp_path / "p.txt", steps=20)
    cache = Cache.open(tmp_path / "c")
    sampling = cache.manifest.sampling
    assert (sampling.height, sampling.width, sampling.image_tokens, sampling.channels) == (512, 512, 1024, 64)
    assert cache.embedding(0).shape == (77, 4096)
    assert len(cache.prompts[1].token_ids) == 77
    assert cache.trajectory(0).velocity_KSC.shape == (20, 1024, 64)
    # mu = 0.63 at 512 px: the second timestep is 0.972, the last sigma but one 0.090.
    assert round(1000 * sampling.timesteps[1]) == 973 and round(1000 * sampling.sigmas[-2]) == 90
    latent_bytes = 128 * 2**10
    record = cache.records["trajectories", 0]
    assert record.raw_bytes == 2 * (22 * latent_bytes + 4)


@pytest.mark.thorough
def test_the_real_configurations_are_flux_devs():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(CONFIGS / "transformer"))
        encoder = T5EncoderModel(T5Config.from_pretrained(CONFIGS / "text_encoder_2"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae"))
    assert transformer.num_parameters() == 11_901_408_320
    assert round(encoder.num_parameters() / 1e9, 3) == 4.762
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 83.8
