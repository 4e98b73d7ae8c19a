"""What quantized weights cost: replay error, and error of the gradient towards the embedding, for each kind.

python benchmarks/quantized_effect.py --cache demo/cache
"""

import argparse
from pathlib import Path

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.schedule import DTYPES
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Quantization
from secondcast.trainer.data.replay_dataset import Batch, ReplayDataset, Source
from secondcast.trainer.losses.validation import spread_rows
from secondcast.trainer.losses.vision import replay

KINDS: tuple[Quantization, ...] = ("int8", "fp8", "nf4")


def load(folder: Path, manifest: Manifest, dtype: str, kind: Quantization, rows: int) -> Backbone:
    return Backbone.load(
        folder,
        recorded_geometry(manifest.sampling),
        text_length=manifest.teacher.text_length,
        dtype=DTYPES[dtype],
        device=torch.device("cpu"),
        options=MemoryOptions(quantize=kind, activation_checkpointing=1),
        conditions=recorded_conditions([manifest], batch_rows=rows),
    )


def gradient(backbone: Backbone, text_BTD: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity, and the gradient of a random weighted sum of it."""
    text_BTD = text_BTD.detach().clone().requires_grad_()
    velocity_BSC = replay(backbone, text_BTD, batch).float()
    weight_BSC = torch.randn(velocity_BSC.shape, generator=torch.Generator().manual_seed(0))
    (velocity_BSC * weight_BSC).sum().backward()
    assert text_BTD.grad is not None
    return velocity_BSC.detach(), text_BTD.grad.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--teacher", type=Path, default=TEACHER_FOLDER)
    parser.add_argument("--dtype", choices=("cache", "bfloat16", "float32"), default="cache")
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="at a time")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    cache = Cache.open(flags.cache)
    manifest = cache.manifest
    dtype = manifest.sampling.dtype if flags.dtype == "cache" else flags.dtype
    dataset = ReplayDataset([Source(cache=cache, indices=cache.indices())], device=torch.device("cpu"))
    records = sorted(spread_rows(len(dataset), manifest.sampling.steps, flags.records), key=lambda row: row[1])
    parts = [records[first : first + flags.rows] for first in range(0, len(records), flags.rows)]
    exact = load(flags.teacher, manifest, dtype, "none", flags.rows)
    print(f"{len(records)} records, recorded in {manifest.sampling.dtype}, replayed in {dtype}\n")
    print("| weights | replay error | first / last part | error of the gradient |")
    print("|---|---|---|---|")
    for kind in ("none", *KINDS):
        backbone = load(flags.teacher, manifest, dtype, kind, flags.rows)
        off, norm, gradient_off, gradient_norm = [], [], 0.0, 0.0
        for part in parts:
            batch = dataset.replay_batch(part)
            text_BTD = dataset.teacher_embeddings([dataset.prompt_of(position) for position, _ in part])
            velocity_BSC, found_BTD = gradient(backbone, text_BTD, batch)
            target_BSC = batch.velocity_BSC.float()
            off.append(float((velocity_BSC - target_BSC).square().sum()))
            norm.append(float(target_BSC.square().sum()))
            _, expected_BTD = gradient(exact, text_BTD, batch)
            gradient_off += float((found_BTD - expected_BTD).square().sum())
            gradient_norm += float(expected_BTD.square().sum())
        ends = [100 * (off[end] / norm[end]) ** 0.5 for end in (0, -1)]
        print(
            f"| {kind} | {100 * (sum(off) / sum(norm)) ** 0.5:.2f} % | {ends[0]:.2f} / {ends[1]:.2f} % | "
            f"{100 * (gradient_off / gradient_norm) ** 0.5:.2f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
