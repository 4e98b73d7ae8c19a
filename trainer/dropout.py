"""Dropout with one mask per row of a batch, independent of the number of processes and parts."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode


class BatchInvariantDropout(TorchFunctionMode):
    """A mode in which dropout of rows first .. first+n-1 of a batch uses those rows of the whole batch's masks.

    Each process and part draws the masks of the whole batch from the same seed, so that the masks do not depend on how
    the batch is split. The mode does not reach dropout fused into an attention kernel: students use eager attention.
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
        # The arithmetic of torch's dropout on a CPU, so that one process with one part draws the same mask.
        mask = torch.empty((self._rows, *input.shape[1:]), dtype=input.dtype, device=input.device)
        mask.bernoulli_(1 - p).div_(1 - p)
        return input * mask[self._first : self._first + len(input)]
