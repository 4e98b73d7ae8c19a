"""What a run minimises."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.memory.host_modulation import HostModulation
from secondcast.trainer.data.replay_dataset import Batch, EmbeddingBatch
from secondcast.trainer.losses.context import context_loss
from secondcast.trainer.losses.depth import depth_errors
from secondcast.trainer.losses.embedding import embedding_loss
from secondcast.trainer.losses.vision import LossFunction, own_loss, row_errors, vision_loss, weights_on
from secondcast.trainer.run.config import StreamVariances
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises: the losses of its stages, with their options, on its caches.

    backbones: one for each cache with trajectories, for its resolution; empty where no stage replays. context_ID: the
    backbone's text projection, fp32, where a stage needs it. sigmas: of each cache with trajectories.
    stream_variances: by the number of blocks, for the depth loss. loss_fn: takes the place of the vision loss in
    training; validations measure the vision loss all the same.
    """

    settings: TrainSettings
    backbones: Sequence[Backbone]
    context_ID: torch.Tensor | None
    sigmas: Sequence[Sequence[float]]
    stream_variances: Mapping[int, StreamVariances] = field(default_factory=dict)
    loss_fn: LossFunction | None = None

    @property
    def predicts(self) -> bool:
        """Whether the whole backbone is there, so that students are compared by its predictions."""
        return bool(self.backbones) and self.backbones[0].predicts

    @property
    def host_modulation(self) -> HostModulation | None:
        """What computes the modulation vectors for the batches, where the host does."""
        return self.backbones[0].host_modulation if self.backbones else None

    def training_loss(self, stage: Stage, student_BTD: torch.Tensor, batch: Batch | EmbeddingBatch) -> torch.Tensor:
        """The loss of a part of a step of a stage; of prompts beside its trajectories, with their weight."""
        if isinstance(batch, EmbeddingBatch):
            return self._text_loss(stage, student_BTD, batch)
        if stage.loss == "depth":
            variances = self.stream_variances[stage.depth_blocks]
            return depth_errors(
                self.backbones[batch.source], student_BTD, batch, variances, huber=stage.huber_delta
            ).mean()
        backbone = self.backbones[batch.source]
        if self.loss_fn is not None:
            loss = own_loss(backbone, student_BTD, batch, self.loss_fn)
        else:
            weights_K = self.weights(stage, batch.source, student_BTD.device)
            loss = vision_loss(backbone, student_BTD, batch, huber=stage.huber_delta, weights_K=weights_K)
        if batch.encoder_hidden_states_BTD is not None:
            term = embedding_loss(student_BTD, batch.encoder_hidden_states_BTD)
            loss = loss + stage.embedding_loss_weight * term
        return loss

    def weights(self, stage: Stage, source: int, device: torch.device) -> torch.Tensor | None:
        """weights_K of a stage on a cache; see timestep_weighting."""
        return weights_on(stage.timestep_weighting, tuple(self.sigmas[source]), device)

    @contextmanager
    def conditions_checked_at_the_end(self) -> Iterator[None]:
        """See ModulationTable.checked_at_the_end."""
        tables = {id(backbone.table): backbone.table for backbone in self.backbones}
        with ExitStack() as stack:
            for table in tables.values():
                if table is not None:
                    stack.enter_context(table.checked_at_the_end())
            yield

    def replay_errors(self, student_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Errors of rows, [B], by which runs with a backbone are compared: of predictions, or of the deepest streams.

        batch: with the teacher's embeddings, unless predictions are compared.
        """
        backbone = self.backbones[batch.source]
        if self.predicts:
            return row_errors(backbone, student_BTD, batch)
        return depth_errors(backbone, student_BTD, batch, self.stream_variances[max(self.stream_variances)])

    def text_loss(self, student_BTD: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
        """The loss by which runs without a backbone are compared: of embeddings, through the projection if there is."""
        teacher_BTD = batch.encoder_hidden_states_BTD
        if self.context_ID is None:
            return embedding_loss(student_BTD, teacher_BTD)
        return context_loss(student_BTD, teacher_BTD, self.context_ID)

    def _text_loss(self, stage: Stage, student_BTD: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
        teacher_BTD, huber = batch.encoder_hidden_states_BTD, stage.huber_delta
        if stage.replays:
            assert self.context_ID is not None
            return stage.context_loss_weight * context_loss(student_BTD, teacher_BTD, self.context_ID)
        if stage.loss == "context":
            assert self.context_ID is not None
            return context_loss(student_BTD, teacher_BTD, self.context_ID, huber=huber)
        assert stage.loss == "embedding"
        return embedding_loss(student_BTD, teacher_BTD, huber=huber)
