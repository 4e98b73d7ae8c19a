"""The teacher's T5 and CLIP, which encode prompts exactly as FluxPipeline does (padded, no attention mask)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.models.weights.checked_loading import load_checked
from secondcast.storage_schemas.errors import TeacherError, reason
from secondcast.storage_schemas.schema.manifest import Pooled


def load_tokenizer(folder: Path) -> Any:
    """The T5 tokenizer of a folder; only the class named here is ever constructed."""
    return _tokenizer(T5TokenizerFast, folder)


def _tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
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


class PooledTextEncoder:
    """The pipeline's CLIP, frozen; FLUX reads its pooled output."""

    def __init__(self, model: CLIPTextModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Load `folder`/text_encoder and `folder`/tokenizer, nothing else."""
        tokenizer = _tokenizer(CLIPTokenizer, folder.part("pooled_tokenizer"))
        return cls(_load_model(CLIPTextModel, folder.part("pooled_text_encoder"), dtype).to(device), tokenizer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """pooled_projections_BP of texts. Source: FluxPipeline._get_clip_prompt_embeds of diffusers."""
        ids_BT = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        pooled_BP: torch.Tensor = self.model(ids_BT.to(self.model.device), output_hidden_states=False).pooler_output
        return pooled_BP


class TeacherTextEncoder:
    """T5-XXL's encoder (or the pocket teacher's), frozen, and CLIP if its pooled output is needed."""

    def __init__(self, model: T5EncoderModel, pooled: PooledTextEncoder | None = None) -> None:
        self.model, self.pooled = model.eval().requires_grad_(False), pooled

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.model.device)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """T5, and CLIP if it is loaded."""
        return [self.model] if self.pooled is None else [self.model, self.pooled.model]

    @classmethod
    def load(cls, folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device, pooled: Pooled = "zero") -> Self:
        """Load `folder`/text_encoder_2, and CLIP if `pooled` is "clip"; nothing else."""
        model = _load_model(T5EncoderModel, folder.part("large_text_encoder"), dtype)
        clip = PooledTextEncoder.load(folder, dtype=dtype, device=device) if pooled == "clip" else None
        return cls(model.to(device), clip)

    @torch.no_grad()
    def encode(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of padded token ids."""
        embedding_BTD: torch.Tensor = self.model(token_ids_BT.to(self.model.device), output_hidden_states=False)[0]
        return embedding_BTD


def _load_model(kind: Any, path: Path, dtype: torch.dtype) -> Any:
    return load_checked(kind, path, part_source(path), dtype=dtype)
