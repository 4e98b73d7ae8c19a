"""How good a student is without training on it: the loss on held-out trajectories, and the floor under it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch

from trainer.feed import Feed
from trainer.losses import Objective, replay, row_errors
from trainer.order import Row


@dataclass
class Errors:
    """Mean squared errors of records, all together and by the step of their trajectory."""

    total: float = 0.0
    count: int = 0
    by_step: dict[int, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of all records alike."""
        return self.total / self.count

    @property
    def means_by_step(self) -> dict[str, float]:
        """Of the records of each step k that has some; keys as JSON has them."""
        return {str(k): sum(values) / len(values) for k, values in sorted(self.by_step.items())}


@torch.no_grad()
def validation_loss(
    objective: Objective, feed: Feed, embed: Callable[[torch.Tensor], torch.Tensor], *, rows: int
) -> Errors:
    """Loss on `rows` records of a feed, spread evenly: vision if there is a backbone, else of embeddings.

    embed: token_ids_BT -> encoder_hidden_states_BTD.
    """
    errors = Errors()
    for part in _parts(objective, feed, rows):
        if objective.backbones:
            batch = feed.replay_batch(part)
            student_BTD = embed(batch.token_ids_BT)
            values = row_errors(objective.backbones[batch.source], student_BTD, batch).tolist()
            for (_, k), value in zip(part, values, strict=True):
                errors.by_step.setdefault(k, []).append(value)
            errors.total += sum(values)
        else:
            text = feed.embedding_batch([position for position, _ in part])
            errors.total += float(objective.text_loss(embed(text.token_ids_BT), text)) * len(part)
        errors.count += len(part)
    return errors


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The loss of a perfect student here: mean squared error, by step, and norm of the error per norm of velocity."""

    error: float
    by_step: dict[str, float]
    relative: float


@torch.no_grad()
def replay_floor(objective: Objective, feed: Feed, *, rows: int) -> Floor:
    """Replay `rows` records of a feed, spread evenly, with the teacher's own embeddings."""
    errors, error, norm = Errors(), 0.0, 0.0
    for part in _parts(objective, feed, rows):
        batch = feed.replay_batch(part)
        teacher_BTD = feed.teacher_embeddings([feed.prompt_of(position) for position, _ in part])
        target_BSC = batch.velocity_BSC.float()
        difference_BSC = replay(objective.backbones[batch.source], teacher_BTD, batch).float() - target_BSC
        values = difference_BSC.square().flatten(1).mean(1).tolist()
        for (_, k), value in zip(part, values, strict=True):
            errors.by_step.setdefault(k, []).append(value)
        errors.total += sum(values)
        errors.count += len(part)
        error += float(difference_BSC.square().sum())
        norm += float(target_BSC.square().sum())
    return Floor(error=errors.mean, by_step=errors.means_by_step, relative=(error / norm) ** 0.5)


def _parts(objective: Objective, feed: Feed, wanted: int) -> Iterator[list[Row]]:
    # What goes through the networks at once is what training was given memory for.
    size = objective.settings.batch_rows
    for _, rows in groupby(validation_rows(feed, wanted), key=lambda row: feed.trajectory_of(row[0])[0]):
        of_one_cache = list(rows)
        for first in range(0, len(of_one_cache), size):
            yield of_one_cache[first : first + size]


def validation_rows(feed: Feed, wanted: int) -> list[Row]:
    """(position, k) of `wanted` records of a feed, spread over its trajectories and their steps; a cache's together."""
    rows = []
    for number, source in enumerate(feed.sources):
        count = len(source.indices)
        due = -(-wanted * count // len(feed))
        rows += [
            (feed.first_of(number) + position, k)
            for position, k in spread_rows(count, source.cache.manifest.sampling.steps, due)
        ]
    return rows


def spread_rows(count: int, steps: int, wanted: int) -> list[Row]:
    """(position, k) of `wanted` different records of `count` trajectories, all if there are fewer, spread over both."""
    rows = min(wanted, count * steps)
    return [(row % count, row * steps // rows) for row in range(rows)]
