"""Second moments of the teacher's token embeddings, streamed over prompts in float64.

Shape letters: N prompts, T text tokens, D text width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Statistics of all tokens of the embeddings of some prompts, padding included: the transformer reads it too.

    mean_D, covariance_DD: of all tokens, float64.
    padding_mean_TD: mean of the padding at each position; where no prompt is that short, the mean of all padding.
    tokens, padding_tokens: their numbers.
    padding_variance_fraction: share of the squared distances to mean_D that is in padding.
    """

    mean_D: torch.Tensor
    covariance_DD: torch.Tensor
    padding_mean_TD: torch.Tensor
    tokens: int
    padding_tokens: int
    padding_variance_fraction: float

    @property
    def padding_fraction(self) -> float:
        """Share of padding among the tokens."""
        return self.padding_tokens / self.tokens

    @classmethod
    def of(cls, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Self:
        """Of batches of embedding_NTD and padding_NT (bool), at least one."""
        sums: list[torch.Tensor] | None = None
        tokens = 0
        for embedding_NTD, padding_NT in batches:
            found = _sums(embedding_NTD.double(), padding_NT)
            sums = found if sums is None else [total.add_(part) for total, part in zip(sums, found, strict=True)]
            tokens += padding_NT.numel()
        assert sums is not None
        total_D, moment_DD, padding_TD, count_T, padding_square = sums
        mean_D, padding = total_D / tokens, int(count_T.sum())
        covariance_DD = moment_DD / tokens - torch.outer(mean_D, mean_D)
        everywhere_D = padding_TD.sum(0) / max(padding, 1)
        padding_mean_TD = torch.where(
            count_T[:, None] > 0, padding_TD / count_T.clamp(min=1)[:, None], everywhere_D
        )  # fmt: skip
        # sum |e - mean|^2 over the padding, from its own sums.
        apart = padding_square - 2 * padding_TD.sum(0) @ mean_D + padding * mean_D.square().sum()
        variance = tokens * covariance_DD.trace()
        return cls(
            mean_D=mean_D,
            covariance_DD=covariance_DD,
            padding_mean_TD=padding_mean_TD,
            tokens=tokens,
            padding_tokens=padding,
            padding_variance_fraction=float(apart / variance) if variance > 0 else 0.0,
        )


def _sums(embedding_NTD: torch.Tensor, padding_NT: torch.Tensor) -> list[torch.Tensor]:
    rows = embedding_NTD.flatten(0, 1)
    padding_NTD = torch.where(padding_NT[..., None], embedding_NTD, 0.0)
    return [
        rows.sum(0),
        rows.T @ rows,
        padding_NTD.sum(0),
        padding_NT.sum(0).to(embedding_NTD.dtype),
        padding_NTD.square().sum(),
    ]


def replace_padding(
    embedding_BTD: torch.Tensor, padding_BT: torch.Tensor, replacement_TD: torch.Tensor
) -> torch.Tensor:
    """embedding_BTD with its padding replaced, position by position, in the dtype of the embedding."""
    return torch.where(padding_BT[..., None], replacement_TD.to(embedding_BTD.dtype), embedding_BTD)
