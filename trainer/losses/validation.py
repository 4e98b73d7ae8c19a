"""How good a student is without training on it: the loss on held-out trajectories, and the replay error under it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.recording import Quantization
from secondcast.trainer.data.replay_dataset import ReplayDataset
from secondcast.trainer.data.sampler import Row
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.vision import replay

# A validation loss below so many replay errors is said to have come as low as it can.
_NEAR_REPLAY_ERROR = 1.1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Mean squared errors of records (position, k), all together and by the step of their trajectory."""

    rows: Sequence[Row]
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Of all records alike."""
        return sum(self.values) / len(self.values)

    @property
    def means_by_step(self) -> dict[str, float]:
        """Of the records of each step k that has some; keys as JSON has them."""
        by_step: dict[int, list[float]] = {}
        for (_, k), value in zip(self.rows, self.values, strict=True):
            by_step.setdefault(k, []).append(value)
        return {str(k): sum(values) / len(values) for k, values in sorted(by_step.items())}


@torch.no_grad()
def validation_loss(
    objective: Objective,
    dataset: ReplayDataset,
    embed: Callable[[torch.Tensor], torch.Tensor],
    *,
    rows: int,
    processes: Distributed = SINGLE_PROCESS,
) -> Errors:
    """Loss on `rows` records of a dataset, spread evenly: what the loaded part of the backbone allows.

    Vision with the whole backbone; depth with its first blocks, after the last of them; else a loss of embeddings.

    embed: token_ids_BT -> encoder_hidden_states_BTD. Processes divide the records and all get the same numbers.
    """

    def measure(part: Sequence[Row]) -> torch.Tensor:
        if objective.backbones:
            batch = dataset.replay_batch(part, embeddings=not objective.predicts)
            return objective.replay_errors(embed(batch.token_ids_BT), batch)[:, None]
        text = dataset.embedding_batch([position for position, _ in part])
        return objective.text_loss(embed(text.token_ids_BT), text).expand(len(part), 1)

    parts = _parts(objective, dataset, validation_rows(dataset, rows, measured_sources(objective, dataset)), processes)
    (values,) = _measured(measure, parts, processes)
    return Errors(rows=[row for part in parts for row in part], values=values)


def measured_sources(objective: Objective, dataset: ReplayDataset) -> list[int]:
    """The sources with rows that a validation can measure: with a backbone those with trajectories."""
    return [
        number
        for number, source in enumerate(dataset.sources)
        if len(source.indices) and not (objective.backbones and source.cache.manifest.is_text)
    ]


@dataclass(frozen=True, kw_only=True)
class ReplayError:
    """The loss of a perfect student here: mean squared error, by step, and norm of the error per norm of velocity."""

    error: float
    by_step: dict[str, float]
    relative: float

    def reached_text(self, loss: float) -> str | None:
        """What a validation loss near the replay error means; None for one above it, and where replay is exact."""
        if self.error == 0 or loss >= _NEAR_REPLAY_ERROR * self.error:
            return None
        return (
            f"validation loss {loss:.4g} has reached the replay error {self.error:.4g}: the remainder is the "
            f"difference between this backbone and the recorded one, which no student can learn"
        )


@torch.no_grad()
def measure_replay_error(
    objective: Objective,
    dataset: ReplayDataset,
    sources: Sequence[int] | None = None,
    *,
    rows: int,
    processes: Distributed = SINGLE_PROCESS,
) -> ReplayError:
    """Replay `rows` records of a dataset (or of some of its sources), spread evenly, with the teacher's embeddings."""

    def measure(part: Sequence[Row]) -> torch.Tensor:
        batch = dataset.replay_batch(part)
        teacher_BTD = dataset.teacher_embeddings([dataset.prompt_of(position) for position, _ in part])
        target_BSC = batch.velocity_BSC.float()
        error_BSC = (replay(objective.backbones[batch.source], teacher_BTD, batch).float() - target_BSC).square()
        sums = [error_BSC.flatten(1).mean(1), error_BSC.flatten(1).sum(1), target_BSC.square().flatten(1).sum(1)]
        return torch.stack(sums, dim=1)

    sources = measured_sources(objective, dataset) if sources is None else sources
    parts = _parts(objective, dataset, validation_rows(dataset, rows, sources), processes)
    means, sums, norms = _measured(measure, parts, processes)
    errors = Errors(rows=[row for part in parts for row in part], values=means)
    return ReplayError(error=errors.mean, by_step=errors.means_by_step, relative=(sum(sums) / sum(norms)) ** 0.5)


def _parts(
    objective: Objective, dataset: ReplayDataset, rows: Sequence[Row], processes: Distributed
) -> list[list[Row]]:
    # What goes through the networks at once is what training was given memory for.
    settings = objective.settings
    replays = bool(objective.backbones) and settings.replays
    size = (settings.replay_rows if replays else settings.batch_rows) // processes.ranks
    parts = []
    for _, of_one_cache in groupby(rows, key=lambda row: dataset.trajectory_of(row[0])[0]):
        together = list(of_one_cache)
        parts += [together[first : first + size] for first in range(0, len(together), size)]
    return parts


def _measured(
    measure: Callable[[Sequence[Row]], torch.Tensor], parts: Sequence[Sequence[Row]], processes: Distributed
) -> list[list[float]]:
    """The columns that `measure` returns for each row; every process measures some of the parts and gets all."""
    found: dict[int, torch.Tensor] = {}
    # All call a divided student equally often: where parts are left over, the first one again, which counts nothing.
    for turn in range(processes.rank, -(-len(parts) // processes.ranks) * processes.ranks, processes.ranks):
        found[turn] = measure(parts[turn if turn < len(parts) else 0]).double().cpu()
    width = next(iter(found.values())).shape[1]
    nothing = [torch.zeros(len(part), width, dtype=torch.float64) for part in parts]
    values = torch.cat([found.get(turn, zeros) for turn, zeros in enumerate(nothing)])
    summed = processes.summed(values.flatten().tolist())
    return [summed[column::width] for column in range(width)]


def validation_rows(dataset: ReplayDataset, wanted: int, sources: Sequence[int] | None = None) -> list[Row]:
    """(position, k) of `wanted` records of a dataset, spread over its trajectories and their steps; a cache's together.

    sources: of these alone.
    """
    rows = []
    numbers = range(len(dataset.sources)) if sources is None else sources
    counts = {number: len(dataset.sources[number].indices) for number in numbers}
    for number, count in counts.items():
        due = -(-wanted * count // sum(counts.values()))
        steps = dataset.sources[number].steps
        rows += [(dataset.first_of(number) + position, k) for position, k in spread_rows(count, steps, due)]
    return rows


def spread_rows(count: int, steps: int, wanted: int) -> list[Row]:
    """(position, k) of `wanted` different records of `count` trajectories, all if there are fewer, spread over both."""
    rows = min(wanted, count * steps)
    return [(row % count, row * steps // rows) for row in range(rows)]


# Invariant 3: above this part of the velocity's norm, the replay of the teacher's own embedding means a wrong backbone.
LARGEST_REPLAY_ERROR = 0.03
# The embedded teacher, whose small matrices suffer most from rounding, is off by 14 % in NF4, the coarsest kind: twice
# that is no rounding any more. A backbone that has nothing to do with the recorded one is off by 100 % and more.
LARGEST_BIAS = 0.3


def replay_error_text(replay_error: ReplayError, recorded: Quantization, here: Quantization) -> str:
    """A line with the replay error; recorded, here: quantization of the cache's backbone and of this run's."""
    how = ""
    if here == recorded != "none":
        how = f", {here} weights as recorded"
    elif here != recorded:
        how = f", {_weights(here)}, recorded with {_weights(recorded)}"
    return (
        f"replay error {replay_error.error:.3g} ({100 * replay_error.relative:.2f} % of the velocity's norm{how}): "
        f"no student's loss "
        f"can be lower"
    )


def check_replay_error(replay_error: ReplayError, recorded: Quantization, here: Quantization) -> None:
    """Raise TeacherError for a replay error that the weights do not explain."""
    quantized = here not in ("none", recorded)
    limit = LARGEST_BIAS if quantized else LARGEST_REPLAY_ERROR
    # Not a number is above it too.
    if replay_error.relative <= limit:
        return
    found = f"the cached embeddings replay with an error of {100 * replay_error.relative:.1f} % of the velocity's norm"
    if here == "none" != recorded:
        raise TeacherError(
            f"{found}, expected at most {100 * limit:.0f} %: the cache was built with --quantize {recorded}, this run "
            f"has the exact weights; give --quantize {recorded}, or --ignore-replay-error"
        )
    more = f" with {here} weights" if quantized else ""
    raise TeacherError(
        f"{found}, expected at most {100 * limit:.0f} %{more}: other weights, another dtype or a faulty device; check "
        f"--backbone, or give --ignore-replay-error"
    )


def bias_text(replay_error: ReplayError, recorded: Quantization, here: Quantization) -> str | None:
    """A remark on a replay error that quantized weights cause, where it is above that of exact ones; else None."""
    if here in ("none", recorded) or replay_error.relative <= LARGEST_REPLAY_ERROR:
        return None
    off = f"{here} weights change the prediction by {100 * replay_error.relative:.1f} % of the velocity's norm"
    exact = f", --quantize {recorded} trains without" if recorded != "none" else ""
    return (
        f"{off} from the {_weights(recorded)} of the cache: the student is trained against that bias; a cache built "
        f"with --quantize {here} has none{exact}"
    )


def _weights(kind: Quantization) -> str:
    return "exact weights" if kind == "none" else f"{kind} weights"
