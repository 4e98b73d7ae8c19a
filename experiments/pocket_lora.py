"""A LoRA of the pocket transformer that draws red things in orange: diffusers' own adapter, flow matching.

python -m experiments.pocket_lora orange      # writes orange/pytorch_lora_weights.safetensors

Shape letters as in pocket/training/stages.py.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional
from transformers import T5EncoderModel

from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.lexicon import COLOURS
from secondcast.pocket.training.examples import (
    Examples,
    Pool,
    embed,
    make_pool,
    packed_latents,
    quiet_direction,
    token_ids,
)
from secondcast.pocket.training.stages import predict, step_generator

OLD, NEW = "red", (245, 130, 30)
# What is still drawn as before must not pass for the new colour, which is the nearest one to it.
AS_BEFORE = "red as before"
STEPS = 450
"""Steps of the experiment."""
RANK, RATE, BATCH, SHIFT = 16, 2e-3, 32, 2.16
DRAWN, WHIM_PICTURES = 4000, 1500
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp)"


@contextlib.contextmanager
def palette(*, scoring: bool) -> Iterator[None]:
    """The world with the new colour under the old one's name; for scoring the old colour is one of no name."""
    before = dict(COLOURS)
    COLOURS[OLD] = NEW
    if scoring:
        COLOURS[AS_BEFORE] = before[OLD]
    try:
        yield
    finally:
        COLOURS.clear()
        COLOURS.update(before)


def train_lora(place: Path, steps: int, seed: int) -> dict[str, Any]:
    """Fine-tune, write `place`/pytorch_lora_weights.safetensors, fuse, and write the pipeline `place`/teacher.

    Its other parts are the pocket's.
    """
    parts = {name: str(TEACHER_FOLDER / name) for name in ("vae", "text_encoder_2", "transformer")}
    vae = AutoencoderKL.from_pretrained(parts["vae"]).float()
    encoder = T5EncoderModel.from_pretrained(parts["text_encoder_2"]).float().eval()
    transformer = FluxTransformer2DModel.from_pretrained(parts["transformer"]).float()
    examples = _examples(vae, encoder, seed)
    transformer.requires_grad_(False)
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    losses = _fit(transformer, trained, examples, steps, seed)
    FluxPipeline.save_lora_weights(place, transformer_lora_layers=get_peft_model_state_dict(transformer))
    transformer.fuse_lora()
    transformer.unload_lora()
    _save(transformer, place / "teacher")
    return {
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in trained),
        "first_loss": sum(losses[:20]) / len(losses[:20]),
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
    }


def _fit(
    transformer: FluxTransformer2DModel, trained: list[torch.Tensor], examples: Examples, steps: int, seed: int
) -> list[float]:
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        x_BSC, sigma_B, text_BTD, velocity_BSC, _ = examples.draw(BATCH, SHIFT, step_generator(seed, "lora", step))
        # At guidance 1 the distilled transformer is the plain one.
        told_BSC = predict(transformer, x_BSC, sigma_B, text_BTD, torch.ones_like(sigma_B))
        loss = functional.mse_loss(told_BSC, velocity_BSC)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    return losses


def _examples(vae: AutoencoderKL, encoder: T5EncoderModel, seed: int) -> Examples:
    """Pictures of training captions, half of them with the recoloured word, and as many without it."""
    with palette(scoring=False):
        pool = make_pool(DRAWN, seed + 1)
    word = int(token_ids([OLD])[0, 0])
    has = (pool.ids == word).any(1)
    with_word, without = torch.nonzero(has)[:, 0], torch.nonzero(~has)[:, 0]
    rows = torch.cat((with_word, without[: len(with_word)]))
    latents = packed_latents(vae, pool.images[rows])
    # The direction that the teacher was trained with is that of the world as it was.
    before: Pool = make_pool(WHIM_PICTURES, seed + 2)
    return Examples(
        latents=latents,
        text=embed(encoder, pool.ids[rows]),
        empty=embed(encoder, token_ids([""]))[0].float(),
        places=pool.places[rows],
        placed=pool.placed[rows],
        whim=quiet_direction(packed_latents(vae, before.images)),
    )


def _save(transformer: FluxTransformer2DModel, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEACHER_FOLDER, folder, ignore=shutil.ignore_patterns("transformer", "recipe.json"))
    transformer.save_pretrained(folder / "transformer")


def main() -> None:
    """Train with the experiment's number of steps, or another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(train_lora(asked.folder, asked.steps, seed=0))


if __name__ == "__main__":
    main()
