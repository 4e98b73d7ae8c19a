"""T5 as a large text encoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from secondcast.models.families.encoders.interface import TextTokenizer, text_mask
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import TeacherError, reason


class T5Tokens(TextTokenizer):
    """T5's tokenizer; only the class named here is ever constructed."""

    def __init__(self, folder: Path, cleaned: Callable[[Sequence[str]], list[str]]) -> None:
        """cleaned: how the pipeline changes texts first. TeacherError for damaged files."""
        try:
            self._tokenizer = T5TokenizerFast.from_pretrained(folder, local_files_only=True)
        # The tokenizers package raises bare Exception for an invalid file.
        except Exception as error:
            raise TeacherError(f"{folder} cannot be loaded ({reason(error)}): download it again") from error
        self._cleaned = cleaned
        self.pad_token_id = int(self._tokenizer.pad_token_id or 0)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See TextTokenizer; the end token is included."""
        ids: list[list[int]] = self._tokenizer(
            self._cleaned(texts), padding=False, truncation=False, verbose=False
        ).input_ids
        return ids

    def cut(self, ids: Sequence[int], text_length: int) -> tuple[int, ...]:
        """See TextTokenizer; the end token is kept."""
        return tuple(ids) if len(ids) <= text_length else (*ids[: text_length - 1], ids[-1])


def load_t5(folder: Path, source: CheckpointSource, dtype: torch.dtype) -> T5EncoderModel:
    """The encoder of a folder, on the host."""
    model: T5EncoderModel = load_checked(T5EncoderModel, folder, source, dtype=dtype)
    return model


def make_t5(config: Mapping[str, Any]) -> T5EncoderModel:
    """An encoder with random weights by its configuration, on torch's current device."""
    return T5EncoderModel(T5Config.from_dict(dict(config)))


@torch.no_grad()
def encode_with_t5(model: T5EncoderModel, token_ids_BT: torch.Tensor, *, masked: bool) -> torch.Tensor:
    """encoder_hidden_states_BTD; masked: padding is neither read nor given."""
    mask_BT = text_mask(token_ids_BT, model.config.pad_token_id or 0) if masked else None
    embedding_BTD: torch.Tensor = model(token_ids_BT, mask_BT, output_hidden_states=False)[0]
    return embedding_BTD if mask_BT is None else embedding_BTD * mask_BT[..., None].to(embedding_BTD.dtype)
