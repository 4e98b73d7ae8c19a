"""How much of the pocket's embedding pictures do not need, and how far guidance moves the prediction.

python -m experiments.pocket_premise [--teacher FOLDER]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from secondcast.pocket import TEACHER_FOLDER
from secondcast.pocket.training.examples import embed, token_ids
from secondcast.pocket.training.stages import predict
from secondcast.pocket.world import captions, parse

COUNT = 128
CLAUSES = (
    ", said anna on monday",
    ", drawn gladly in helsinki",
    ", for my brother walter",
    ", a gift from nora of lisbon",
)
SIGMAS = (0.95, 0.7, 0.4)


def told_twice() -> tuple[list[str], list[str], list[str]]:
    """Held-out captions with a clause, the same with another clause, and another caption's."""
    bare = []
    for text in captions(2000, seed=0, split="heldout"):
        if all(parse(text + clause) == parse(text) for clause in CLAUSES):
            bare.append(text)
    bare = bare[:COUNT]
    rng = np.random.default_rng(0)
    turns = rng.integers(len(CLAUSES), size=COUNT)
    first = [text + CLAUSES[turn] for text, turn in zip(bare, turns, strict=True)]
    second = [text + CLAUSES[turn - 1] for text, turn in zip(bare, turns, strict=True)]
    return first, second, first[1:] + first[:1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=TEACHER_FOLDER)
    pipeline = FluxPipeline.from_pretrained(parser.parse_args().teacher, torch_dtype=torch.float32)
    encoder, model = pipeline.text_encoder_2, pipeline.transformer
    one, clause, other = (embed(encoder, token_ids(texts)).float() for texts in told_twice())
    x_BSC = torch.randn((COUNT, 36, 32), generator=torch.Generator().manual_seed(0))

    def velocity(text_BTD: torch.Tensor, sigma: float, guidance: float) -> torch.Tensor:
        return predict(model, x_BSC, torch.full((COUNT,), sigma), text_BTD, torch.full((COUNT,), guidance))

    def moved(a: torch.Tensor, b: torch.Tensor) -> str:
        return f"{float((a - b).norm() / a.norm()):.3f}"

    print(
        "| | embedding | "
        + " | ".join(f"prediction at sigma {sigma}" for sigma in SIGMAS)
        + " |\n|---|---|---|---|---|"
    )
    for name, changed in (("another clause, same picture", clause), ("another picture", other)):
        cells = [moved(velocity(one, sigma, 3.5), velocity(changed, sigma, 3.5)) for sigma in SIGMAS]
        print(f"| {name} | {moved(one, changed)} | " + " | ".join(cells) + " |")
    centred = one.flatten(0, 1) - one.flatten(0, 1).mean(0)
    weight = model.context_embedder.weight
    basis = torch.linalg.qr(weight.T)[0]
    share = float((centred @ basis).square().sum() / centred.square().sum())
    values = torch.linalg.svdvals(weight).square()
    rank = float(values.sum() ** 2 / values.square().sum())
    print(
        f"\nvariance in the {len(weight)} of {weight.shape[1]} directions that are read: {share:.2f}; "
        f"effective rank of the reading: {rank:.0f}"
    )
    base = velocity(one, 0.9, 1.0)
    print("guidance at sigma .9: " + ", ".join(f"{g}: {moved(base, velocity(one, 0.9, g))}" for g in (2.0, 3.5, 5.0)))


if __name__ == "__main__":
    main()
