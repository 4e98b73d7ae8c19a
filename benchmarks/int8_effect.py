"""What eight bits cost: the error of int8 predictions against the per-step loss of a trained student.

python benchmarks/int8_effect.py --cache demo/cache --student demo/student
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.schedule import DTYPES
from secondcast.models.student.folder import student_folder
from secondcast.models.student.student import load_student
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.codecs.by_field import as_read
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import fields_of
from secondcast.trainer.data.replay_dataset import ReplayDataset, Source
from secondcast.trainer.losses.vision import replay


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--limit", type=int, default=64, help="trajectories, held-out ones first")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    cache = Cache.open(flags.cache)
    manifest = cache.manifest
    held = np.array([cache.prompts[cache.layout.place(int(i)).prompt].held_out for i in cache.indices()])
    indices = np.concatenate([cache.indices()[held], cache.indices()[~held]])[: flags.limit]
    dataset = ReplayDataset([Source(cache=cache, indices=indices)], device=torch.device("cpu"))
    student = load_student(student_folder(Path(flags.student)))
    backbone = Backbone.load(
        TEACHER_FOLDER,
        recorded_geometry(manifest.sampling),
        text_length=manifest.teacher.text_length,
        dtype=DTYPES[manifest.sampling.dtype],
        device=torch.device("cpu"),
    )
    velocity_field = next(field for field in fields_of(manifest, "trajectories") if field.name == "velocity")
    steps = manifest.sampling.steps
    loss_K, rounding_K, norm_K = np.zeros(steps), np.zeros(steps), np.zeros(steps)
    for position, index in enumerate(indices):
        velocity_KSC = cache.trajectory(int(index)).velocity_KSC
        rounded_KSC = as_read(velocity_field, "int8", velocity_KSC[None])[0]
        exact = velocity_KSC.astype(np.float64)
        rounding_K += np.square(rounded_KSC.astype(np.float64) - exact).mean((1, 2))
        norm_K += np.square(exact).mean((1, 2))
        batch = dataset.replay_batch([(position, k) for k in range(steps)])
        student_BTD = student(batch.token_ids_BT)[0]
        difference = replay(backbone, student_BTD, batch).float() - batch.velocity_BSC.float()
        loss_K += difference.square().mean((1, 2)).double().numpy()
    print(f"{len(indices)} trajectories, {int(held.sum())} of the cache's are held out\n")
    print("| step | student's loss | int8's squared error | part of the loss | relative error of v |")
    print("|---|---|---|---|---|")
    for k in (*range(0, steps, max(1, steps // 5)), steps - 1):
        part, relative = rounding_K[k] / loss_K[k], (rounding_K[k] / norm_K[k]) ** 0.5
        row = f"| {k} | {loss_K[k] / len(indices):.2e} | {rounding_K[k] / len(indices):.2e}"
        print(f"{row} | {100 * part:.2f} % | {100 * relative:.2f} % |")
    whole = rounding_K.sum() / loss_K.sum()
    print(
        f"| all | {loss_K.sum() / steps / len(indices):.2e} | {rounding_K.sum() / steps / len(indices):.2e} | "
        f"{100 * whole:.2f} % | {100 * (rounding_K.sum() / norm_K.sum()) ** 0.5:.2f} % |"
    )


if __name__ == "__main__":
    main()
