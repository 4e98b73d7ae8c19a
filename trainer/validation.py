"""How good a student is without training on it: the loss on held-out trajectories, and the floor under it."""

from collections.abc import Callable, Iterator

import torch

from trainer.feed import Feed
from trainer.losses import Objective, replay


@torch.no_grad()
def validation_loss(objective: Objective, feed: Feed, embed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Mean loss on trajectories of a feed, at steps spread evenly: vision if there is a backbone, else of embeddings.

    embed: token_ids_BT -> encoder_hidden_states_BTD.
    """
    total, count = 0.0, 0
    for part in _parts(objective, feed):
        batch = (
            feed.replay_batch(part)
            if objective.backbone is not None
            else feed.embedding_batch([position for position, _ in part])
        )
        total += float(objective.plain_loss(embed(batch.token_ids_BT), batch)) * len(part)
        count += len(part)
    return total / count


@torch.no_grad()
def replay_floor(objective: Objective, feed: Feed) -> tuple[float, float]:
    """The loss of a perfect student here: mean squared error, and norm of the error per norm of velocity."""
    assert objective.backbone is not None
    error = norm = count = 0.0
    for part in _parts(objective, feed):
        batch = feed.replay_batch(part)
        teacher_BTD = feed.teacher_embeddings([feed.prompt_of(position) for position, _ in part])
        target_BSC = batch.velocity_BSC.float()
        difference_BSC = replay(objective.backbone, teacher_BTD, batch).float() - target_BSC
        error += float(difference_BSC.square().sum())
        norm += float(target_BSC.square().sum())
        count += target_BSC.numel()
    return error / count, (error / norm) ** 0.5


def _parts(objective: Objective, feed: Feed) -> Iterator[list[tuple[int, int]]]:
    settings, steps = objective.settings, feed.cache.manifest.sampling.steps
    rows = validation_rows(len(feed), steps, settings.validate_rows)
    # What goes through the networks at once is what training was given memory for.
    size = settings.batch_size // settings.accumulate
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def validation_rows(count: int, steps: int, wanted: int) -> list[tuple[int, int]]:
    """(position, k) of `wanted` records of `count` trajectories, spread over both."""
    rows = min(wanted, count * steps)
    return [(row % count, (row * steps // rows + row // count) % steps) for row in range(rows)]
