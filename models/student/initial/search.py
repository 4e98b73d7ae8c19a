"""Search for the parts of an encoder: swaps of one part at a time, while the error falls."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from secondcast.models.student.initial.projection import PairsOfBatches, ridge

Parts = tuple[int, ...]
"""Numbers of kept layers or heads, ascending."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """The context error that a linear readout of an encoder reaches on held-out prompts."""

    fitted: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    held: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, fitted: PairsOfBatches, held: PairsOfBatches, context_ID: torch.Tensor) -> "Readout":
        """With the teacher's embeddings as the transformer reads them, on its device."""

        def read(pairs: PairsOfBatches) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
            device = context_ID.device
            return tuple((ids.to(device), linear(found.to(device).float(), context_ID)) for ids, found in pairs)

        return cls(fitted=read(fitted), held=read(held))

    @torch.no_grad()
    def error(self, encoder: nn.Module) -> float:
        """The mean squared error of a ridge regression of the transformer's input on the encoder's output."""
        gram, cross = 0.0, 0.0
        for ids_BT, context_BTI in self.fitted:
            hidden_ND = encoder(input_ids=ids_BT).last_hidden_state.flatten(0, 1)
            gram = gram + (hidden_ND.T @ hidden_ND).double()
            cross = cross + (hidden_ND.T @ context_BTI.flatten(0, 1)).double()
        assert isinstance(gram, torch.Tensor) and isinstance(cross, torch.Tensor)
        coefficients_DI = ridge(gram, cross).float()
        total, count = 0.0, 0
        for ids_BT, context_BTI in self.held:
            found_BTI = encoder(input_ids=ids_BT).last_hidden_state @ coefficients_DI
            total += float((found_BTI - context_BTI).double().square().sum())
            count += context_BTI.numel()
        return total / count


def best_by_swaps(
    starts: Iterable[Parts],
    swaps: Callable[[Parts], Iterable[tuple[int, int]]],
    error: Callable[[Parts], float],
    *,
    evaluations: int,
) -> Parts:
    """The best of some choices after swaps that lower the error, with a bounded number of evaluations.

    swaps: pairs of a kept part and its replacement, the most promising first.
    """
    known: dict[Parts, float] = {}
    for start in starts:
        known.setdefault(start, error(start))
    best = min(known, key=known.__getitem__)
    while len(known) < evaluations:
        candidates = (_swapped(best, old, new) for old, new in swaps(best))
        candidate = next((parts for parts in candidates if parts not in known), None)
        if candidate is None:
            break
        known[candidate] = error(candidate)
        best = min(best, candidate, key=known.__getitem__)
    return best


def _swapped(parts: Parts, old: int, new: int) -> Parts:
    return tuple(sorted((*(part for part in parts if part != old), new)))
