"""The losses: the paper's (replay through the frozen backbone), and the embedding errors of its warm-up."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch.nn.functional import huber_loss, linear, mse_loss

from secondcast.models.backbone import FluxBackbone
from secondcast.models.memory.host_modulation import HostModulation
from secondcast.trainer.data.feed import Batch, EmbeddingBatch
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage


def replay(backbone: FluxBackbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """velocity_BSC of the backbone on cached latents with the given embedding."""
    return backbone.predict(
        batch.hidden_states_BSC.to(backbone.dtype),
        embedding_BTD.to(backbone.dtype),
        batch.pooled_BP.to(backbone.dtype),
        batch.timestep_B.to(backbone.dtype),
        batch.guidance_B,
        modulation_BM=batch.modulation_BM,
    )


def difference(found: torch.Tensor, wanted: torch.Tensor, huber: float | None = None) -> torch.Tensor:
    """Mean squared difference in fp32; 2 huber |x| - huber^2 in place of x^2 where |x| is above `huber`."""
    return mse_loss(found.float(), wanted.float()) if huber is None else _differences(found, wanted, huber).mean()


def _differences(found: torch.Tensor, wanted: torch.Tensor, huber: float | None) -> torch.Tensor:
    if huber is None:
        return mse_loss(found.float(), wanted.float(), reduction="none")
    # torch's has half a square: twice it equals the squared difference where the difference is small.
    return 2 * huber_loss(found.float(), wanted.float(), delta=huber, reduction="none")


def vision_loss(
    backbone: FluxBackbone,
    embedding_BTD: torch.Tensor,
    batch: Batch,
    *,
    huber: float | None = None,
    weights_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared difference, in fp32, of the backbone's prediction and the cached one (paper, equation 3).

    embedding_BTD: the student's, any float dtype, a row for every batch.share rows; it is rounded to the backbone's.
    weights_K: fp32, multiplies the mean of a row by its step; None leaves the rows alike.
    """
    if batch.share > 1:
        embedding_BTD = embedding_BTD.repeat_interleave(batch.share, dim=0)
    found_BSC = replay(backbone, embedding_BTD, batch)
    if weights_K is None:
        return difference(found_BSC, batch.velocity_BSC, huber)
    errors_BSC = _differences(found_BSC, batch.velocity_BSC, huber)
    return (weights_K[batch.step_B] * errors_BSC.flatten(1).mean(1)).mean()


def embedding_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """Mean squared difference of embeddings, in fp32: the paper's "naive" distillation; needs no backbone."""
    return difference(embedding_BTD, teacher_BTD, huber)


def context_loss(
    embedding_BTD: torch.Tensor, teacher_BTD: torch.Tensor, weight_ID: torch.Tensor, *, huber: float | None = None
) -> torch.Tensor:
    """The embedding error as the backbone sees it: after its text projection, weight_ID in fp32 (I its inner width).

    What the projection maps to zero costs nothing. Its bias falls out of the difference.
    """
    return difference(linear(embedding_BTD.float(), weight_ID), linear(teacher_BTD.float(), weight_ID), huber)


def step_weights(name: Literal["uniform", "sigma", "interval"], sigmas: Sequence[float]) -> torch.Tensor | None:
    """Weight of step k, [K] fp32 with mean 1; None for uniform, where every step counts alike as in the paper.

    sigma: sigma_k, more for the noisy steps, in which the composition is decided. interval: sigma_k - sigma_{k+1},
    how far the prediction moves the latent: the loss is then a mean over sigma and not over steps.
    """
    if name == "uniform":
        return None
    sigmas_K1 = torch.tensor(sigmas, dtype=torch.float64)
    weights_K = sigmas_K1[:-1] if name == "sigma" else sigmas_K1[:-1] - sigmas_K1[1:]
    return (weights_K / weights_K.mean()).float()


@cache
def _weights_on(
    name: Literal["uniform", "sigma", "interval"], sigmas: tuple[float, ...], device: torch.device
) -> torch.Tensor | None:
    # Copied once: a copy from memory that is not pinned waits for the device.
    weights_K = step_weights(name, sigmas)
    return None if weights_K is None else weights_K.to(device)


def row_errors(backbone: FluxBackbone, embedding_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared difference, in fp32, of each row of a batch (whose share is 1): [B]."""
    found_BSC = replay(backbone, embedding_BTD, batch)
    return _differences(found_BSC, batch.velocity_BSC, None).flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises: the losses of its stages, with their options, on its caches.

    backbones: one for each cache, for its resolution; empty where no stage replays. context_ID: the backbone's text
    projection, fp32, where a stage needs it. sigmas: of each cache.
    """

    settings: TrainSettings
    backbones: Sequence[FluxBackbone]
    context_ID: torch.Tensor | None
    sigmas: Sequence[Sequence[float]]

    @property
    def host_modulation(self) -> HostModulation | None:
        """What computes the modulation vectors for the batches, where the host does."""
        return self.backbones[0].host_modulation if self.backbones else None

    def training_loss(self, step: int, student_BTD: torch.Tensor, batch: Batch | EmbeddingBatch) -> torch.Tensor:
        """The loss of optimizer step `step`."""
        stage = self.settings.stage_at(step)
        if isinstance(batch, EmbeddingBatch):
            return self._text_loss(stage, student_BTD, batch)
        weights_K = self.weights(stage, batch.source, student_BTD.device)
        backbone = self.backbones[batch.source]
        loss = vision_loss(backbone, student_BTD, batch, huber=stage.huber, weights_K=weights_K)
        if batch.encoder_hidden_states_BTD is not None:
            term = embedding_loss(student_BTD, batch.encoder_hidden_states_BTD)
            loss = loss + stage.embedding_term * term
        return loss

    def weights(self, stage: Stage, source: int, device: torch.device) -> torch.Tensor | None:
        """weights_K of a stage on a cache; see step_weights."""
        return _weights_on(stage.step_weights, tuple(self.sigmas[source]), device)

    @contextmanager
    def conditions_checked_at_the_end(self) -> Iterator[None]:
        """See ModulationTable.checked_at_the_end."""
        tables = {id(backbone.table): backbone.table for backbone in self.backbones}
        with ExitStack() as stack:
            for table in tables.values():
                if table is not None:
                    stack.enter_context(table.checked_at_the_end())
            yield

    def text_loss(self, student_BTD: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
        """The loss by which runs without a backbone are compared: of embeddings, through the projection if there is."""
        teacher_BTD = batch.encoder_hidden_states_BTD
        if self.context_ID is None:
            return embedding_loss(student_BTD, teacher_BTD)
        return context_loss(student_BTD, teacher_BTD, self.context_ID)

    def _text_loss(self, stage: Stage, student_BTD: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
        teacher_BTD = batch.encoder_hidden_states_BTD
        if stage.loss == "embedding":
            return embedding_loss(student_BTD, teacher_BTD, huber=stage.huber)
        assert self.context_ID is not None
        return context_loss(student_BTD, teacher_BTD, self.context_ID, huber=stage.huber)
