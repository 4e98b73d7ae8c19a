"""Score a teacher folder through the unmodified FluxPipeline on held-out captions."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.pocket.world import IMAGE_SIZE

STEPS: int = 20
BATCH: int = 32


def sample(
    folder: Path, texts: list[str], *, guidance: float, dtype: torch.dtype, seed: int, steps: int = STEPS
) -> np.ndarray:
    """Pictures of the texts, uint8 [N, H, W, 3], each from noise of its own number."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + row) for row in range(len(batch))]
        images = pipeline(
            batch,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=generators,
            output_type="np",
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def mean_scores(images: np.ndarray, texts: list[str]) -> dict[str, float]:
    """The mean of each dimension over the pictures that it applies to."""
    found: dict[str, list[float]] = defaultdict(list)
    for image, text in zip(images, texts, strict=True):
        for dimension, value in score(image, text).items():
            found[dimension].append(value)
    return {dimension: round(float(np.mean(found[dimension])), 4) for dimension in DIMENSIONS if found[dimension]}
