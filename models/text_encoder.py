"""The teacher's T5: token ids and embeddings exactly as FluxPipeline makes them (padded, no attention mask)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import T5EncoderModel, T5TokenizerFast

from models.teacher_folder import TeacherFolder
from storage_schemas.errors import BadTeacher


def load_tokenizer(folder: Path) -> Any:
    """The T5 tokenizer of a folder; only the class named here is ever constructed."""
    return T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def token_ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, end token included, neither cut nor padded."""
    ids: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False).input_ids
    return ids


def cut_token_ids(ids: Sequence[int], text_length: int) -> tuple[int, ...]:
    """Token ids cut to the text length as the tokenizer cuts them: the end token is kept."""
    return tuple(ids) if len(ids) <= text_length else (*ids[: text_length - 1], ids[-1])


class TeacherTextEncoder:
    """T5-XXL's encoder (or the pocket's), frozen."""

    def __init__(self, model: T5EncoderModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.model.device)

    @classmethod
    def load(cls, folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Load `folder`/text_encoder_2 and nothing else."""
        path = folder.part("text_encoder_2")
        try:
            model = T5EncoderModel.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise BadTeacher(f"{path} cannot be loaded ({reason}): download it again") from error
        return cls(model.to(device))

    @torch.no_grad()
    def encode(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of padded token ids."""
        embedding_BTD: torch.Tensor = self.model(token_ids_BT.to(self.model.device), output_hidden_states=False)[0]
        return embedding_BTD
