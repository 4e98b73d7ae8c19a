"""The teacher's text encoders, which encode prompts exactly as its pipeline does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import T5EncoderModel, T5TokenizerFast

from secondcast.models.families.family import ConditioningEncoder
from secondcast.models.families.text import text_mask
from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.models.weights.checked_loading import load_checked
from secondcast.storage_schemas.errors import TeacherError, reason
from secondcast.storage_schemas.schema.manifest import Pooled


def load_tokenizer(folder: Path) -> Any:
    """The T5 tokenizer of a folder; only the class named here is ever constructed."""
    try:
        return T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    # The tokenizers package raises bare Exception for an invalid file.
    except Exception as error:
        raise TeacherError(f"{folder} cannot be loaded ({reason(error)}): download it again") from error


def token_ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, including the end token, neither truncated nor padded."""
    ids: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False).input_ids
    return ids


def cut_token_ids(ids: Sequence[int], text_length: int) -> tuple[int, ...]:
    """Token ids truncated to the text length as the tokenizer does: the end token is kept."""
    return tuple(ids) if len(ids) <= text_length else (*ids[: text_length - 1], ids[-1])


def load_conditioning_encoder(
    folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device
) -> ConditioningEncoder:
    """The text encoders of a teacher beside the large one, and nothing else."""
    roles = [role for pair in folder.family.conditioning_roles for role in pair]
    return folder.family.conditioning_encoder({role: folder.part(role) for role in roles}, dtype=dtype, device=device)


class TeacherTextEncoder:
    """T5-XXL's encoder (or the pocket teacher's), frozen, and the text encoders beside it if they are needed."""

    def __init__(
        self, model: T5EncoderModel, conditioning: ConditioningEncoder | None = None, *, masks_text: bool = False
    ) -> None:
        """masks_text: whether padding is neither read nor given."""
        self.model, self.conditioning = model.eval().requires_grad_(False), conditioning
        self._masks_text = masks_text

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.model.device)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """T5, and those beside it that are loaded."""
        return [self.model, *([] if self.conditioning is None else self.conditioning.networks)]

    @classmethod
    def load(cls, folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device, pooled: Pooled = "zero") -> Self:
        """Load the large text encoder, and those beside it if `pooled` is "clip"; nothing else."""
        model = _load_model(T5EncoderModel, folder.part("large_text_encoder"), dtype)
        beside = load_conditioning_encoder(folder, dtype=dtype, device=device) if pooled == "clip" else None
        return cls(model.to(device), beside, masks_text=folder.family.masks_text)

    @torch.no_grad()
    def encode(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of padded token ids."""
        token_ids_BT = token_ids_BT.to(self.model.device)
        mask_BT = text_mask(token_ids_BT, self.model.config.pad_token_id or 0) if self._masks_text else None
        embedding_BTD: torch.Tensor = self.model(token_ids_BT, mask_BT, output_hidden_states=False)[0]
        return embedding_BTD if mask_BT is None else embedding_BTD * mask_BT[..., None].to(embedding_BTD.dtype)


def _load_model(kind: Any, path: Path, dtype: torch.dtype) -> Any:
    return load_checked(kind, path, part_source(path), dtype=dtype)
