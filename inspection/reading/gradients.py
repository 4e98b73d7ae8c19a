"""The measured metric: how much the prediction changes with each direction of a token's embedding.

The vision loss of an embedding that is off by d is, to first order of the prediction, |J d|^2 with J the derivative
of the prediction. Its mean over tokens and records, E[J_t^T J_t], is estimated by the gradients of random projections
of the prediction: E[g g^T] = J^T J for g = J^T s and random signs s.
"""

from collections.abc import Sequence

import numpy as np
import torch

from secondcast.evaluation.open_loop import step_batches
from secondcast.evaluation.replaying import cached_embeddings
from secondcast.models.backbone import Backbone
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache


def measured_metric(
    cache: Cache,
    backbone: Backbone,
    records: Sequence[tuple[int, int]],
    *,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> torch.Tensor:
    """metric_DD, float64: mean of g_t g_t^T over the tokens t of these records (trajectory index, step).

    The signs of a record depend on seed and record alone. NonFiniteError for a gradient that is not finite.
    """
    recorded = cached_embeddings(cache, backbone.device)
    width = cache.manifest.teacher.text_width
    metric_DD = torch.zeros(width, width, dtype=torch.float64, device=backbone.device)
    done = 0
    with progress.bar("gradients", total=len(records), done=0, unit="records") as bar:
        for steps, kept in step_batches(cache, backbone, records, batch_size=batch_size):
            embedding_BTD = recorded(steps.prompts).float().requires_grad_()
            with torch.enable_grad():
                velocity_BSC = steps.predict(backbone, embedding_BTD)[:kept].float()
                signs_BSC = random_signs(seed, records[done : done + kept], velocity_BSC)
                (gradient_BTD,) = torch.autograd.grad((velocity_BSC * signs_BSC).sum(), embedding_BTD)
            rows = gradient_BTD[:kept].double().flatten(0, 1)
            metric_DD += rows.T @ rows
            done += kept
            bar.advance(kept)
    if not bool(torch.isfinite(metric_DD).all()):
        raise NonFiniteError(
            f"a gradient of the prediction on {cache.folder} is not finite: it overflowed; try --backbone-dtype float32"
        )
    return metric_DD / (len(records) * cache.manifest.teacher.text_length)


def random_signs(seed: int, records: Sequence[tuple[int, int]], like_BSC: torch.Tensor) -> torch.Tensor:
    """1 and -1 for each element of a prediction of these records, a function of seed and record."""
    shape = like_BSC.shape[1:]
    drawn = [
        np.random.default_rng([seed, index, k]).integers(0, 2, size=shape, dtype=np.int8) * 2 - 1
        for index, k in records
    ]
    return torch.from_numpy(np.stack(drawn)).to(like_BSC)
