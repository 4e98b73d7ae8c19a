"""Dropout whose masks belong to the rows of a batch, however many processes or parts compute it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode


class BatchInvariantDropout(TorchFunctionMode):
    """Inside it, dropout of rows first .. first+n-1 of a batch takes those rows of the whole batch's masks.

    All who compute a part of the batch draw all of its masks from the same seed: numbers that are not needed cost less
    than masks that depend on how the batch was divided. Dropout fused into an attention kernel is not reached:
    students compute attention eagerly.
    """

    def __init__(self, *, first: int, rows: int) -> None:
        super().__init__()
        self._first, self._rows = first, rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See torch.overrides."""
        named = dict(kwargs or {})
        if func is not dropout:
            return func(*args, **named)
        return self._dropout(*args, **named)

    def _dropout(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p == 0:
            return input
        # The arithmetic of torch's own dropout on a CPU, so that one process with one part draws what it would.
        mask = torch.empty((self._rows, *input.shape[1:]), dtype=input.dtype, device=input.device)
        mask.bernoulli_(1 - p).div_(1 - p)
        return input * mask[self._first : self._first + len(input)]
