"""Truncation of embeddings to rank r that loses least in a metric.

A metric M = A^T A weighs a change d of a token's embedding as d^T M d. The best code of r numbers for M is the
projection of A (e - mean) on the first r principal components U_r of its covariance A C A^T, and the embedding is
predicted from the code by linear regression: C A^T U_r L_r^-1 code, with L the eigenvalues. What M does not see of the
embedding is so neither kept nor set to zero, but predicted as well as the code allows, and M need not be invertible.

Shape letters: D text width, I rows of A, R the largest rank.
"""

from dataclasses import dataclass
from typing import Self

import torch

# Eigenvalues below this part of the largest one are rounding errors of float64 sums, not variance.
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """The truncations of all ranks in one metric, float64: a code of unit variance and the regression on it.

    encoder_RD: from the distance to mean_D to the code; decoder_DR: back. Rank r takes the first r of R.
    """

    mean_D: torch.Tensor
    encoder_RD: torch.Tensor
    decoder_DR: torch.Tensor

    @classmethod
    def of(cls, mean_D: torch.Tensor, covariance_DD: torch.Tensor, root_ID: torch.Tensor) -> Self:
        """The truncations in the metric root_ID^T root_ID of tokens with this mean and covariance, all float64.

        R is at most the numerical rank of the covariance in the metric.
        """
        cross_ID = root_ID @ covariance_DD
        variance_I, components_II = torch.linalg.eigh(cross_ID @ root_ID.T)
        variance_I, components_II = variance_I.flip(0), components_II.flip(1)
        kept = int((variance_I > _SMALLEST_VARIANCE * variance_I[0]).sum())
        scaled_IR = components_II[:, :kept] / variance_I[:kept].sqrt()
        return cls(mean_D=mean_D, encoder_RD=scaled_IR.T @ root_ID, decoder_DR=cross_ID.T @ scaled_IR)

    def apply(self, embedding_BTD: torch.Tensor, rank: int) -> torch.Tensor:
        """The embedding truncated to a rank, float64."""
        code_BTR = (embedding_BTD.double() - self.mean_D) @ self.encoder_RD[:rank].T
        return self.mean_D + code_BTR @ self.decoder_DR[:, :rank].T


def row_space(weight_ID: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis, as rows, of what a projection reads: the complement of its null space."""
    _, singular_R, basis_RD = torch.linalg.svd(weight_ID, full_matrices=False)
    floor = singular_R[0] * max(weight_ID.shape) * torch.finfo(weight_ID.dtype).eps
    return basis_RD[singular_R > floor]


def metric_root(metric_DD: torch.Tensor) -> torch.Tensor:
    """A root A of a symmetric metric: A^T A = metric_DD."""
    values_D, vectors_DD = torch.linalg.eigh(metric_DD)
    return values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T
