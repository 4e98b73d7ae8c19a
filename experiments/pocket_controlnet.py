"""A ControlNet of the pocket transformer that reads silhouettes, and what exchanging the text encoder costs with it.

python -m experiments.pocket_controlnet silhouettes heldout.txt --student demo/student

Writes silhouettes/net, a ControlNet trained by flow matching on training captions, and silhouettes/control, a control
image for each prompt: its scene in a place drawn at random, whatever the noise prefers. Then it generates the prompts'
images by each text encoder, with the ControlNet and without, and prints a table. What exists is kept.

Shape letters as in pocket/training/stages.py.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from PIL import Image
from torch.nn import functional
from transformers import T5EncoderModel

from secondcast.evaluation.generate import generate
from secondcast.evaluation.intervals import bootstrap
from secondcast.evaluation.pictures.folder import picture_name
from secondcast.evaluation.settings.generating import TEACHER, GenerateOptions
from secondcast.evaluation.text_encoder import teacher_parts
from secondcast.models.teacher.folder import find_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.lexicon import COLOURS, GROUNDS, INK, PAPER, SKIES
from secondcast.pocket.scorer import score
from secondcast.pocket.training.examples import KIND_WEIGHTS, embed, packed_latents, token_ids
from secondcast.pocket.training.pictures import arrangements, draw
from secondcast.pocket.training.stages import predict, step_generator
from secondcast.pocket.world import Landscape, Scene, Sign, caption, draw_scene, require_scene
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.schema.fields import Array

STEPS, RATE, BATCH, SHIFT, DRAWN = 600, 1e-3, 32, 2.16, 4000
CPU = torch.device("cpu")


def silhouette(image_HWC: Array, scene: Scene) -> Array:
    """Where the objects, or the board, of a picture are: bool [H, W]."""
    behind = [*SKIES.values(), *GROUNDS.values()] if isinstance(scene, Landscape) else [PAPER]
    before = [*COLOURS.values(), *([INK] if isinstance(scene, Sign) else [])]
    distance = image_HWC[:, :, None, :].astype(np.int64) - np.array([*before, *behind])
    nearest: Array = (distance**2).sum(axis=-1).argmin(axis=-1)
    return nearest < len(before)


def drawn(scene: Scene, rng: np.random.Generator) -> Array:
    """A picture of a scene in a random place, uint8 [H, W, 3]."""
    return draw(scene, int(rng.integers(len(arrangements(scene)))))


def control_image(picture_HWC: Array, scene: Scene) -> Array:
    """The silhouette in white on black, uint8 [H, W, 3]."""
    return np.repeat(silhouette(picture_HWC, scene)[..., None], 3, axis=-1).astype(np.uint8) * 255


def train_controlnet(folder: Path, steps: int, seed: int) -> None:
    """Fit a ControlNet of one block and write it into a folder, with its last loss on standard output."""
    parts = {name: str(TEACHER_FOLDER / name) for name in ("vae", "text_encoder_2", "transformer")}
    transformer = FluxTransformer2DModel.from_pretrained(parts["transformer"]).float().requires_grad_(False)
    encoder = T5EncoderModel.from_pretrained(parts["text_encoder_2"]).float().eval()
    vae = AutoencoderKL.from_pretrained(parts["vae"]).float()
    rng = np.random.default_rng([seed, 1])
    scenes = [draw_scene(rng, split="train", weights=KIND_WEIGHTS) for _ in range(DRAWN)]
    text_NTD = embed(encoder, token_ids([caption(scene, rng) for scene in scenes]))
    pictures = [drawn(scene, rng) for scene in scenes]
    controls = [control_image(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    latent_NSC, control_NSC = (packed_latents(vae, _pixels(images)) for images in (pictures, controls))
    torch.manual_seed(seed)
    config = transformer.config
    controlnet = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=0, attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        draws = step_generator(seed, "controlnet", step)
        rows = torch.randint(len(latent_NSC), (BATCH,), generator=draws)
        # Any noise, not the one that would choose this place by itself.
        noise_BSC = torch.randn(latent_NSC[rows].shape, generator=draws)
        uniform_B = torch.rand(BATCH, generator=draws).clamp(min=1e-3)
        sigma_B = SHIFT * uniform_B / (1 + (SHIFT - 1) * uniform_B)
        x_BSC = torch.lerp(latent_NSC[rows], noise_BSC, sigma_B[:, None, None])
        told_BSC = _controlled(controlnet, transformer, control_NSC[rows], x_BSC, sigma_B, text_NTD[rows].float())
        loss = functional.mse_loss(told_BSC, noise_BSC - latent_NSC[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"step {step + 1}: loss {np.mean(losses[-50:]):.4f}", flush=True)
    controlnet.save_pretrained(folder)


def _controlled(
    controlnet: FluxControlNetModel,
    transformer: FluxTransformer2DModel,
    control_BSC: torch.Tensor,
    x_BSC: torch.Tensor,
    sigma_B: torch.Tensor,
    text_BTD: torch.Tensor,
) -> torch.Tensor:
    """The velocity with the ControlNet, both networks at guidance 1: the distilled one is there the plain one."""

    def both(**call: Any) -> Any:
        double, _ = controlnet(controlnet_cond=control_BSC, **call)
        return transformer(controlnet_block_samples=double, **call)

    return predict(both, x_BSC, sigma_B, text_BTD, torch.ones_like(sigma_B))


def _pixels(images: Sequence[Array]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_controls(folder: Path, prompts: Sequence[str]) -> None:
    """Control images of prompts, by their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for number, scene in enumerate(map(require_scene, prompts)):
        Image.fromarray(control_image(drawn(scene, rng), scene)).save(folder / picture_name(number, ""))


@dataclass(frozen=True, kw_only=True)
class Row:
    """Images of a text encoder: scores, agreement with the silhouettes, and the images themselves."""

    name: str
    controlled: bool
    binding: list[float]
    layout: list[float]
    mean: list[float]
    images_NHWC: Array


def measure(folder: Path, encoder: str, prompts: Sequence[str], *, controlled: bool) -> Row:
    """Generate what is missing, and score it. layout: intersection over union with the control's silhouette."""
    given = {"controlnet": folder / "net", "control_images": folder / "control"} if controlled else {}
    out = folder / "images" / f"{Path(encoder).resolve().name}-{'controlled' if controlled else 'plain'}"
    teacher = find_teacher(str(TEACHER_FOLDER), teacher_parts(encoder, "zero"))
    asked = GenerateOptions(dtype="float32", **given)
    generate(encoder, teacher, prompts, out, asked, batch_size=64, device=CPU, progress=Silent())
    images_NHWC = np.stack([np.asarray(Image.open(out / picture_name(*numbered))) for numbered in enumerate(prompts)])
    scores = [score(image_HWC, prompt) for image_HWC, prompt in zip(images_NHWC, prompts, strict=True)]
    layout = []
    for number, (image_HWC, prompt) in enumerate(zip(images_NHWC, prompts, strict=True)):
        wanted = np.asarray(Image.open(folder / "control" / picture_name(number, "")))[..., 0] > 0
        found = silhouette(image_HWC, require_scene(prompt))
        layout.append(float((wanted & found).sum() / (wanted | found).sum()))
    return Row(
        name=encoder, controlled=controlled, binding=[one["binding"] for one in scores if "binding" in one],
        layout=layout, mean=[float(np.mean(list(one.values()))) for one in scores], images_NHWC=images_NHWC,
    )  # fmt: skip


def print_table(rows: Sequence[Row]) -> None:
    """Means with intervals over prompts; differences are paired, teacher minus student."""
    print("| text encoder | ControlNet | layout | binding | all scores | distance to the teacher's image | lost |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        teacher = next(one for one in rows if one.name == TEACHER and one.controlled == row.controlled)
        difference_NHWC = row.images_NHWC.astype(np.float64) - teacher.images_NHWC
        cells = [_cell(row.layout), _cell(row.binding), _cell(row.mean)]
        if row is teacher:
            cells += ["", ""]
        else:
            lost = [own - other for own, other in zip(teacher.mean, row.mean, strict=True)]
            cells += [_cell((abs(difference_NHWC).mean(axis=(1, 2, 3)) / 255).tolist()), _cell(lost)]
        print(f"| {row.name} | {'yes' if row.controlled else 'no'} | {' | '.join(cells)} |")


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = bootstrap(values) or (float("nan"), float("nan"))
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Train, write control images, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path, help="Captions of the pocket, one a line.")
    parser.add_argument("--student", action="append", default=[], help="A run or an export; may be repeated.")
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    prompts = [line for line in asked.prompts.read_text().splitlines() if line]
    if not (asked.folder / "net").is_dir():
        train_controlnet(asked.folder / "net", asked.steps, seed=0)
    write_controls(asked.folder / "control", prompts)
    measured = partial(measure, asked.folder, prompts=prompts)
    print_table([measured(name, controlled=on) for name in (TEACHER, *asked.student) for on in (False, True)])


if __name__ == "__main__":
    main()
