"""The text of a batch as a transformer reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from secondcast.models.families.encoders.interface import Conditioning
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.tensors import stacked, to_torch


@dataclass(frozen=True, kw_only=True)
class Text:
    """What the transformer reads of prompts: encoder_hidden_states_BTD, and the rest of their conditioning."""

    embedding_BTD: torch.Tensor
    conditioning: Conditioning

    def on(self, device: torch.device) -> Self:
        """The same on a device."""
        conditioning = {name: rows.to(device) for name, rows in self.conditioning.items()}
        return type(self)(embedding_BTD=self.embedding_BTD.to(device), conditioning=conditioning)

    def repeated(self, rows: int) -> Self:
        """One row as many."""
        conditioning = {name: row.expand(rows, *row.shape[1:]) for name, row in self.conditioning.items()}
        embedding_BTD = self.embedding_BTD.expand(rows, *self.embedding_BTD.shape[1:])
        return type(self)(embedding_BTD=embedding_BTD, conditioning=conditioning)

    def after(self, first: "Text") -> "Text":
        """The rows of another text, as many as there are here, and then these."""
        if len(first.embedding_BTD) == 1:
            first = first.repeated(len(self.embedding_BTD))
        # A student with its own tokenizer may have fewer tokens than the cache.
        before_BTD = first.embedding_BTD[:, : self.embedding_BTD.shape[1]]

        def joined(before_BX: torch.Tensor, own_BX: torch.Tensor) -> torch.Tensor:
            return torch.cat([before_BX.to(own_BX), own_BX])

        return Text(
            embedding_BTD=joined(before_BTD, self.embedding_BTD),
            conditioning={name: joined(first.conditioning[name], own) for name, own in self.conditioning.items()},
        )


def recorded_text(cache: Cache, prompts: Sequence[int]) -> Text:
    """The recorded text of prompts by number, on the host."""
    return Text(
        embedding_BTD=to_torch(np.stack([cache.embedding(prompt) for prompt in prompts])),
        conditioning=stacked([cache.conditioning(prompt) for prompt in prompts]),
    )
