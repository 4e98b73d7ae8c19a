"""The output projection of a student, fitted in closed form to its teacher's embeddings.

Suffixes: D width of the student's encoder, R rows of the first linear (the teacher's text width), I inner width of the
transformer, N tokens.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import linear, normalize

from secondcast.models.student.student_network import SecondcastStudent

PairsOfBatches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Batches of token_ids_BT and the teacher's embedding_BTD; may be read several times."""
RIDGE = 1e-4
"""Of the mean square of the features."""
# Smaller eigenvalues of a second moment, in parts of their mean, are rounding.
_SMALLEST = 1e-6
_SEED = 0


def ridge(gram_RR: torch.Tensor, cross_RD: torch.Tensor) -> torch.Tensor:
    """coefficients_RD, float64, of the regression with the given sums of products of features and of targets."""
    gram_RR = gram_RR.double().clone()
    gram_RR.diagonal().add_(RIDGE * gram_RR.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cholesky_solve(cross_RD.double(), torch.linalg.cholesky(gram_RR))


@torch.no_grad()
def context_error(student: SecondcastStudent, pairs: PairsOfBatches, context_ID: torch.Tensor) -> float:
    """Mean squared difference from the teacher behind the transformer's text projection: the context loss."""
    device = context_ID.device
    total, count = 0.0, 0
    for ids_BT, embedding_BTD in pairs:
        difference_BTD = student(ids_BT.to(device))[0].float() - embedding_BTD.to(device).float()
        context_BTI = linear(difference_BTD, context_ID)
        total += float(context_BTI.double().square().sum())
        count += context_BTI.numel()
    return total / count


@torch.no_grad()
def fit_projection(student: SecondcastStudent, pairs: PairsOfBatches, context_ID: torch.Tensor) -> int:
    """Set the linears of the projection; returns how many directions of the encoder's output they pass.

    The first passes a signal through the ReLU as it is, by rows V and -V: all directions, or those that matter most to
    the transformer where it has too few rows for all. Further rows are random. The second is a ridge regression; with a
    low rank, two factors of the matrix of that rank with the lowest context error.
    """
    first, *last = (part for part in student.final_projection if isinstance(part, nn.Linear))
    rows, width = first.weight.shape
    passed = min(width, rows // 2)
    if passed == width:
        kept_RD = torch.eye(width)
    else:
        kept_RD = _directions(*_products(student, pairs, context_ID.device), context_ID, passed)
    generator = torch.Generator().manual_seed(_SEED)
    random_RD = torch.randn(rows - 2 * passed, width, generator=generator) * width**-0.5
    first.weight.copy_(torch.cat([kept_RD, -kept_RD, random_RD]))
    gram_RR, cross_RD = _products(student, pairs, context_ID.device, first)
    coefficients_RD = ridge(gram_RR, cross_RD)
    if len(last) == 1:
        last[0].weight.copy_(coefficients_RD.T)
    else:
        for part, factor in zip(
            last, _factors(coefficients_RD, cross_RD, context_ID, last[0].out_features), strict=True
        ):
            part.weight.copy_(factor)
    return passed


def _factors(
    coefficients_RD: torch.Tensor, cross_RD: torch.Tensor, context_ID: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [rank, R] and [D, rank] of a regression, float64: reduced-rank regression of the transformer's input.

    Source: "Reduced Rank Ridge Regression and Its Kernel Extensions" (2011): the full regression, projected to the
    main directions of its fitted values; here of those that the transformer reads.
    """
    context_ID = context_ID.cpu().double()
    context_RI = coefficients_RD @ context_ID.T
    # The second moment of the fitted values: a ridge regression times the products that it is fitted to.
    main_IC = torch.linalg.eigh(context_RI.T @ (cross_RD.double() @ context_ID.T)).eigenvectors[:, -rank:]
    return (context_RI @ main_IC).T, torch.linalg.pinv(context_ID) @ main_IC


def _products(
    student: SecondcastStudent, pairs: PairsOfBatches, device: torch.device, first: nn.Linear | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean products of features with one another and with the teacher's embedding, float64, on the CPU.

    first: the linear before the ReLU; None: the features are the encoder's output.
    """
    gram, cross, tokens = None, None, 0
    for ids_BT, embedding_BTD in pairs:
        hidden_ND = student.encoder(input_ids=ids_BT.to(device)).last_hidden_state.flatten(0, 1)
        feature_NR = hidden_ND if first is None else torch.relu(first(hidden_ND))
        target_ND = embedding_BTD.to(device).float().flatten(0, 1)
        products = (feature_NR.T @ feature_NR).double(), (feature_NR.T @ target_ND).double()
        gram = products[0] if gram is None else gram.add_(products[0])
        cross = products[1] if cross is None else cross.add_(products[1])
        tokens += len(feature_NR)
    assert gram is not None and cross is not None
    return gram.cpu() / tokens, cross.cpu() / tokens


def _directions(moment_DD: torch.Tensor, cross_DR: torch.Tensor, context_ID: torch.Tensor, count: int) -> torch.Tensor:
    """Unit rows [count, D] that span what predicts the transformer's input best, by linear regression."""
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    root_D = values_D.clamp_min(_SMALLEST * float(values_D.mean())).sqrt()
    root_DD = vectors_DD * root_D @ vectors_DD.T
    inverse_DD = vectors_DD / root_D @ vectors_DD.T
    context_DI = ridge(moment_DD, cross_DR) @ context_ID.cpu().double().T
    read_DI = root_DD @ context_DI
    best_DC = torch.linalg.eigh(read_DI @ read_DI.T).eigenvectors[:, -count:]
    rows_CD = best_DC.T @ inverse_DD
    return normalize(rows_CD).float()
