"""The first-order stand-in for the vision loss: which directions and tokens of an embedding the transformer reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch

from storage_schemas import sensitivity
from storage_schemas.errors import BadSettings
from storage_schemas.fields import Array
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import Sensitivity, combined, predicted_weights


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of the tokens of a cache's prompts: measured ones of those that were sampled, else predicted, else 1.

    predictor_D1: see storage_schemas.sensitivity; None where none could be fitted.
    """

    measured: Sensitivity | None
    predictor_D1: Array | None

    def of(self, prompt_id: str, embedding_TD: Array) -> Array:
        """weights_T, fp32, of a prompt with the teacher's embedding."""
        found = None if self.measured is None else self.measured.weights_of(prompt_id)
        if found is not None:
            return found
        if self.predictor_D1 is None:
            return np.ones(len(embedding_TD), dtype=np.float32)
        return predicted_weights(self.predictor_D1, embedding_TD)


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What `--loss sensitivity` needs beside the embeddings: metric_DD of all caches, token weights of each by name."""

    metric_DD: Array
    weights: Mapping[str, TokenWeights]
    digests: Mapping[str, str]

    @classmethod
    def read(cls, caches: Mapping[str, Cache]) -> Self:
        """What was measured on these caches; BadSettings where it was on none of them.

        A cache without a measurement of its own, or with one of too few prompts to predict by, has the predictor of
        the one that sampled most.
        """
        found = {name: sensitivity.read(cache.folder) for name, cache in caches.items()}
        measured = {name: one for name, one in found.items() if one is not None}
        if not measured:
            folder = next(iter(caches.values())).folder
            begun = sensitivity.unfinished(folder)
            found_there = "none was measured on" if begun is None else f"only {begun[0]} of {begun[1]} parts are on"
            raise BadSettings(
                f"--loss is sensitivity, but {found_there} {folder}: `understudy sensitivity "
                f"{folder}` does, once, with the transformer"
            )
        for name, one in measured.items():
            _check_teacher(one, caches[name])
        largest = max(measured.values(), key=lambda one: len(one.record.plan.prompt_ids))
        return cls(
            metric_DD=combined(list(measured.values())),
            weights={
                name: TokenWeights(measured=one, predictor_D1=_predictor_of(one, largest))
                for name, one in found.items()
            },
            digests={name: one.record.arrays_xxh3_128 for name, one in measured.items()},
        )

    def remarks(self) -> Iterator[str]:
        """What is worth saying before training by it."""
        for name, weights in self.weights.items():
            if weights.measured is None:
                how = "are 1" if weights.predictor_D1 is None else "are predicted by what was measured on another"
                yield f"no sensitivity was measured on {name}: the weights of its tokens {how}"

    @cached_property
    def _roots(self) -> dict[tuple[float, torch.device], torch.Tensor]:
        return {}

    def root_on(self, floor: float, device: torch.device) -> torch.Tensor:
        """root_DD, made once."""
        key = (floor, device)
        if key not in self._roots:
            self._roots[key] = self.root_DD(floor, device)
        return self._roots[key]

    def root_DD(self, floor: float, device: torch.device) -> torch.Tensor:
        """R, fp32, with R R^T = metric + floor * (its mean eigenvalue) * I: d R has the squared norm d^T metric d."""
        metric_DD = torch.from_numpy(self.metric_DD).to(device, torch.float64)
        small = max(floor * float(metric_DD.diagonal().mean()), torch.finfo(torch.float64).tiny)
        metric_DD.diagonal().add_(small)
        factor_DD, failed = torch.linalg.cholesky_ex(metric_DD)
        if not failed:
            return factor_DD.float()
        # With hardly a floor, a metric of few products has no Cholesky factor; eigenvectors take twenty times as long.
        values_D, vectors_DD = torch.linalg.eigh(metric_DD)
        return (vectors_DD * values_D.clamp(min=0).sqrt()).float()


def _predictor_of(own: Sensitivity | None, largest: Sensitivity) -> Array | None:
    return largest.predictor_D1 if own is None or own.predictor_D1 is None else own.predictor_D1


def _check_teacher(measured: Sensitivity, cache: Cache) -> None:
    was, now = measured.record.plan.teacher_digest, cache.manifest.digests()["teacher"]
    if was != now:
        raise BadSettings(
            f"{cache.folder}/{sensitivity.SENSITIVITY_FOLDER} was measured on the teacher {was[:12]}, the cache is of "
            f"{now[:12]}: what one transformer reads says nothing of another; measure it with `understudy sensitivity "
            f"{cache.folder} --anew`"
        )


def sensitivity_loss(
    embedding_BTD: torch.Tensor,
    teacher_BTD: torch.Tensor,
    root_DD: torch.Tensor,
    weights_BT: torch.Tensor,
    *,
    floor: float,
) -> torch.Tensor:
    """Mean over rows of sum_t (w_t + floor) d_t^T M d_t / (1 + floor), in fp32: the vision loss to second order.

    What it leaves out are the blocks of that matrix between different tokens. root_DD: of M, see Surrogate.root_DD.
    """
    moved_BTD = (embedding_BTD.float() - teacher_BTD.float()) @ root_DD
    weighted_BT = (weights_BT + floor) / (1 + floor) * moved_BTD.square().sum(-1)
    return weighted_BT.sum(1).mean()
