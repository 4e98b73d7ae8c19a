"""The rows of each optimizer step, and what a process reads of them: a function of the step number."""

from collections.abc import Sequence

from secondcast.trainer.data.mixture import TrainingCache, prompt_orders, stage_orders
from secondcast.trainer.data.replay_dataset import BatchSpec, ReplayDataset, Rows
from secondcast.trainer.data.sampler import rank_slice
from secondcast.trainer.settings import StepOfStage, TrainSettings


class BatchPlan:
    """Which rows of a dataset each optimizer step reads, and which of them are those of process `rank` of `ranks`.

    A process computes a step in equal parts, first those of the stage's batch, then with a context_loss_weight as many
    of prompts.
    """

    def __init__(
        self,
        settings: TrainSettings,
        training_caches: Sequence[TrainingCache],
        dataset: ReplayDataset,
        *,
        rank: int,
        ranks: int,
    ) -> None:
        self._settings, self._rank, self._ranks = settings, rank, ranks
        self._orders = stage_orders(settings, training_caches, dataset)
        self._prompt_orders = prompt_orders(settings, training_caches, dataset)

    def requests(self, step: int) -> list[BatchSpec]:
        """The parts of optimizer step `step` that this process computes, in order."""
        at = self._settings.at(step)
        stage = at.stage
        per_sample = stage.timesteps_per_sample if stage.replays else 1
        of_batch = [
            BatchSpec(
                replays=stage.replays,
                rows=part,
                timesteps_per_sample=per_sample,
                embeddings=stage.replays and stage.needs_embeddings,
            )
            for part in self._own_parts(self.rows(at), stage.grad_accum_steps, per_sample)
        ]
        prompts = self._own_parts(self.prompt_rows(at), stage.grad_accum_steps, 1)
        return of_batch + [BatchSpec(replays=False, rows=part) for part in prompts]

    def rows(self, at: StepOfStage) -> Rows:
        """The batch of an optimizer step, all processes together."""
        return self._orders[at.number].batch(at.position)

    def prompt_rows(self, at: StepOfStage) -> Rows:
        """The prompts that a step compares beside its trajectories, all processes together; mostly none."""
        order = self._prompt_orders[at.number]
        return [] if order is None else order.batch(at.position)

    def rows_of_part(self, at: StepOfStage, number: int) -> tuple[Rows, bool]:
        """The rows of a part of a step, and whether they are prompts beside its trajectories.

        number: its place among the parts of all processes, one after the other.
        """
        parts = at.stage.grad_accum_steps
        rank, number = divmod(number, at.stage.parts_per_process)
        of_prompts, part = divmod(number, parts)
        rows = self.prompt_rows(at) if of_prompts else self.rows(at)
        return _parts(rows, self._ranks * parts)[rank * parts + part], bool(of_prompts)

    def _own_parts(self, rows: Rows, count: int, timesteps_per_sample: int) -> list[Rows]:
        own = rank_slice(rows, rank=self._rank, ranks=self._ranks, rows_per_pass=count * timesteps_per_sample)
        return _parts(own, count)


def _parts(rows: Rows, count: int) -> list[Rows]:
    """Rows in `count` equal parts; none of no rows."""
    size = len(rows) // count
    return [rows[first : first + size] for first in range(0, len(rows), size or 1)]
