"""A tiny Stable Diffusion 3 over the pocket world, and what the exported negative embedding is worth.

python -m experiments.pocket_sd3 DIR [--teacher-steps 3000] [--prompts 1024] [--captions 96] [--seeds 3]

The transformer of SD3, small, is trained with a tenth of the prompts empty, over the pocket's own text encoder and VAE,
which stay as they are. Its two CLIPs give zeros: all text comes through T5. Then, by the commands: record with
classifier-free guidance, train a student, and score pictures of the teacher, of the student as exported, and of the
same student without the teacher's embedding of the negative prompt. The same command continues after an interruption.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from experiments.pocket_harness import RECORDING, Job, as_flags, command, keep_asked, result_of, work_off
from secondcast.models.families.encoders.interface import CLIP_ROWS
from secondcast.models.families.family import POOLED
from secondcast.models.families.sd3 import SD3
from secondcast.models.geometry import Geometry
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.pocket.training.examples import (
    LATENT_SIZE,
    Examples,
    embed,
    encode_images,
    make_pool,
    quiet_direction,
    token_ids,
)
from secondcast.pocket.training.networks import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    make_pooled_tokenizer,
    make_tokenizer,
)
from secondcast.pocket.training.stages import Stage, StageSettings, run_stage
from secondcast.pocket.world import IMAGE_SIZE, captions

WIDTH, CLIP_WIDTH, CLIP_LENGTH = 128, 16, 8
SIDE = LATENT_SIZE // 2
GEOMETRY = Geometry(height=IMAGE_SIZE, width=IMAGE_SIZE, rows=SIDE, columns=SIDE, channels=4 * LATENT_CHANNELS)
FLOW = {"batch": 32, "learning_rate": 2e-3, "averaging": 0.998, "muon_rate": 5e-3}
GUIDANCE, SCALES, EMPTY = 4.0, "3.0,4.0,5.0", 0.1
TRAINING = {
    "student": "pocket-small",
    "pretrain_loss": "context",
    "pretrain_lr": 3e-3,
    "learning_rate": 2e-4,
    "batch_size": 40,
    "lr_schedule": "cosine",
    "dropout": 0.0,
    "position_bias_lr_scale": 20.0,
}


def make_transformer() -> SD3Transformer2DModel:
    """Four blocks; modulation and output start at zero."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
    )
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(SD3.anatomy.modulation):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def make_clip() -> CLIPTextModelWithProjection:
    """A CLIP whose results are zero."""
    tokens = len(make_pooled_tokenizer())
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=CLIP_WIDTH,
        intermediate_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    model = CLIPTextModelWithProjection(config)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def flow_stage(settings: StageSettings, transformer: SD3Transformer2DModel, examples: Examples) -> Stage:
    """Flow matching, a tenth of the prompts replaced by the empty one."""
    rows = settings.batch
    conditioning = {
        POOLED: torch.zeros(rows, 2 * CLIP_WIDTH),
        CLIP_ROWS: torch.zeros(rows, CLIP_LENGTH, 2 * CLIP_WIDTH),
    }

    def loss(generator: torch.Generator) -> Tensor:
        x_BSC, sigma_B, text_BTD, velocity_BSC, _ = examples.draw(rows, settings.shift, generator)
        dropped_B = torch.rand(rows, generator=generator) < EMPTY
        text_BTD = torch.where(dropped_B[:, None, None], examples.empty, text_BTD)
        found_BSC = SD3.call(transformer, x_BSC, text_BTD, conditioning, 1000 * sigma_B, None, {"geometry": GEOMETRY})
        return functional.mse_loss(found_BSC, velocity_BSC)

    return Stage(settings, nn.ModuleDict({"transformer": transformer}), loss)


def make_teacher(place: Path, steps: int, seed: int) -> Mapping[str, Any]:
    """Train the transformer and write `place`/teacher, a folder of StableDiffusion3Pipeline."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(TEACHER_FOLDER / "vae").float()
    encoder = T5EncoderModel.from_pretrained(TEACHER_FOLDER / "text_encoder_2").float().eval()
    pool = make_pool(20_000, seed)
    latents = encode_images(vae, pool.images)
    examples = Examples(
        latents=latents,
        text=embed(encoder, pool.ids),
        empty=embed(encoder, token_ids([""]))[0].float(),
        places=pool.places,
        placed=pool.placed,
        whim=quiet_direction(latents),
    )
    transformer = make_transformer()
    settings = StageSettings(name="flow", steps=steps, **FLOW)
    run_stage(flow_stage(settings, transformer, examples), place, seed, print)
    parts: dict[str, Any] = {"vae": vae, "text_encoder_3": encoder, "transformer": transformer}
    parts |= {"text_encoder": make_clip(), "text_encoder_2": make_clip()}
    tokenizers = {name: make_pooled_tokenizer() for name in ("tokenizer", "tokenizer_2")}
    for tokenizer in tokenizers.values():
        tokenizer.model_max_length = CLIP_LENGTH
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.shift),
        tokenizer_3=make_tokenizer(),
        **tokenizers,
        **parts,
    )
    pipeline.to(torch.bfloat16).save_pretrained(place / "teacher")
    return {"steps": steps}


def record(place: Path, teacher: Path, count: int) -> Mapping[str, Any]:
    """Captions and their trajectories."""
    command("prompts", "pocket", place / "p.txt", "--num-prompts", count)
    command(
        "build", place / "cache", "--prompts", place / "p.txt",
        *as_flags({**RECORDING, "teacher": teacher, "guidance": SCALES}),
    )  # fmt: skip
    return {"prompts": count}


def train(place: Path, teacher: Path, cache: Path, seed: int, steps: tuple[int, int]) -> Mapping[str, Any]:
    """A student, and its export with and without the negative prompt's embedding."""
    flags = {**TRAINING, "pretrain_steps": steps[0], "steps": steps[1], "seed": seed}
    command(
        "train", place / "run", "--cache", cache, "--backbone", teacher, "--quiet", "--device", "cpu", *as_flags(flags)
    )
    shutil.rmtree(place / "with", ignore_errors=True)
    shutil.rmtree(place / "without", ignore_errors=True)
    command("export", place / "run", place / "with", "--quiet")
    shutil.copytree(place / "with", place / "without")
    config = json.loads((place / "without/config.json").read_text())
    del config["negative_token_ids"]
    (place / "without/config.json").write_text(json.dumps(config))
    weights = load_file(place / "without/model.safetensors")
    del weights["negative_TD"]
    save_file(weights, place / "without/model.safetensors", metadata={"format": "pt"})
    return {"seed": seed}


def pictures(place: Path, teacher: Path, student: Path | str, count: int) -> Mapping[str, Any]:
    """Mean scores of held-out captions, by dimension."""
    texts = captions(count, seed=0, split="heldout")
    (place / "p.txt").write_text("\n".join(texts) + "\n")
    command(
        "generate", student, "--out", place / "pictures", "--prompts", place / "p.txt", "--device", "cpu", "--quiet",
        *as_flags({"teacher": teacher, "steps": 20, "guidance": GUIDANCE, "dtype": "float32", "batch_size": 48}),
    )  # fmt: skip
    from PIL import Image

    index = [json.loads(line) for line in (place / "pictures/index.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for entry in index:
        image_HWC = np.asarray(Image.open(place / "pictures" / entry["file"]))
        for dimension, value in score(image_HWC, entry["prompt"]).items():
            found.setdefault(dimension, []).append(value)
    return {"scores": {name: float(np.mean(found[name])) for name in DIMENSIONS if name in found}}


def table(folder: Path, seeds: int) -> str:
    """Markdown."""
    rows = {"teacher": ["teacher"]} | {
        f"student, {kind} the teacher's negative": [f"{kind}-{seed}" for seed in range(seeds)]
        for kind in ("with", "without")
    }
    lines = [f"| pictures of | {' | '.join(DIMENSIONS)} | mean |", f"|{'---|' * (len(DIMENSIONS) + 2)}"]
    for title, names in rows.items():
        results = [result for name in names if (result := result_of(folder / "pictures" / name)) is not None]
        means = [np.mean([result["scores"].get(name, np.nan) for result in results]) for name in DIMENSIONS]
        lines.append(f"| {title} | {' | '.join(f'{mean:.3f}' for mean in means)} | {np.mean(means):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--pretrain-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    asked = vars(parser.parse_args())
    folder, jobs = asked.pop("folder").absolute(), asked.pop("jobs")
    keep_asked(folder, asked)
    teacher, cache = folder / "teacher/teacher", folder / "recorded/cache"
    steps = (asked["pretrain_steps"], asked["steps"])
    work_off([Job(place=folder / "teacher", work=make_teacher, arguments=(asked["teacher_steps"], 0))], 1)
    work_off([Job(place=folder / "recorded", work=record, arguments=(teacher, asked["prompts"]))], 1)
    seeds, places = range(asked["seeds"]), folder / "students"
    work_off([Job(place=places / f"{s}", work=train, arguments=(teacher, cache, s, steps)) for s in seeds], jobs)
    shown: dict[str, Path | str] = {"teacher": "teacher"}
    shown |= {f"{kind}-{seed}": places / f"{seed}" / kind for kind in ("with", "without") for seed in seeds}
    work_off(
        [
            Job(place=folder / "pictures" / name, work=pictures, arguments=(teacher, student, asked["captions"]))
            for name, student in shown.items()
        ],
        jobs,
    )
    print(table(folder, asked["seeds"]))


if __name__ == "__main__":
    main()
