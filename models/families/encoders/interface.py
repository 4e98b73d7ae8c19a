"""What a family's text encoders are to everything else: the large one's tokenizer, and the encoders beside it.

Imports torch within functions only, because families are read without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Conditioning = Mapping[str, "torch.Tensor"]
"""What a transformer reads of a prompt besides the text, by the name of its argument or of the recorded array."""
CLIP_ROWS = "clip_hidden_states"


class ConditioningEncoder(ABC):
    """Frozen text encoders whose results are recorded beside the embedding."""

    networks: list[Any]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> "dict[str, torch.Tensor]":
        """The conditioning of texts, by name; a row of each array for each text."""


class TextTokenizer(ABC):
    """The tokenizer of a large text encoder, as the pipeline calls it.

    pad_token_id: fills rows up to the text length.
    """

    pad_token_id: int

    @abstractmethod
    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, neither truncated nor padded."""

    @abstractmethod
    def cut(self, ids: Sequence[int], text_length: int) -> tuple[int, ...]:
        """Token ids truncated to the text length."""

    def padded(self, texts: Sequence[str], text_length: int) -> "torch.Tensor":
        """token_ids_BT, int64, truncated and padded on the right."""
        import torch

        ids_BT = torch.full((len(texts), text_length), self.pad_token_id, dtype=torch.int64)
        for row_T, ids in zip(ids_BT, self.token_ids(texts), strict=True):
            cut = self.cut(ids, text_length)
            row_T[: len(cut)] = torch.tensor(cut)
        return ids_BT


def text_mask(token_ids_BT: "torch.Tensor", pad_token_id: int) -> "torch.Tensor":
    """[B, T] int64: 1 for the text, whose last token is no padding, and 0 for the padding behind it."""
    return (token_ids_BT != pad_token_id).long().flip(1).cummax(1).values.flip(1)
