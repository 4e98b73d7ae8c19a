"""The CLIP text encoders beside a large one, which encode prompts exactly as the pipelines of diffusers do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from secondcast.models.families.encoders.interface import CLIP_ROWS, ConditioningEncoder
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import TeacherError, reason
from secondcast.storage_schemas.schema.fields import POOLED


class PooledClip(ConditioningEncoder):
    """One CLIP, of which the pooled output is read. Source: FluxPipeline._get_clip_prompt_embeds of diffusers."""

    def __init__(self, model: CLIPTextModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.networks = [self.model]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """pooled_projections_BP."""
        ids_BT = _token_ids(self.tokenizer, texts, self.tokenizer.model_max_length).to(self.model.device)
        return {POOLED: self.model(ids_BT, output_hidden_states=False).pooler_output}


class ClipPair(ConditioningEncoder):
    """Two CLIPs, of which projected outputs and second-last layers are read, side by side.

    Source: StableDiffusion3Pipeline._get_clip_prompt_embeds of diffusers.
    """

    def __init__(self, models: Sequence[CLIPTextModelWithProjection], tokenizers: Sequence[Any]) -> None:
        self.networks = [model.eval().requires_grad_(False) for model in models]
        self._tokenizers = list(tokenizers)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """pooled_projections_BP and clip_hidden_states_BLW."""
        # The pipeline cuts for both at the length of the first tokenizer.
        length = self._tokenizers[0].model_max_length
        found = [
            model(_token_ids(tokenizer, texts, length).to(model.device), output_hidden_states=True)
            for model, tokenizer in zip(self.networks, self._tokenizers, strict=True)
        ]
        rows_BLW = [
            output.hidden_states[-2].to(model.dtype) for output, model in zip(found, self.networks, strict=True)
        ]
        return {
            POOLED: torch.cat([output[0] for output in found], dim=-1),
            CLIP_ROWS: torch.cat(rows_BLW, dim=-1),
        }


def load_clip(kind: Any, model: Path, tokenizer: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A CLIP of the given class from its folder, and its tokenizer; TeacherError for damaged files."""
    try:
        read = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    # The tokenizers package raises bare Exception for an invalid file.
    except Exception as error:
        raise TeacherError(f"{tokenizer} cannot be loaded ({reason(error)}): download it again") from error
    source = CheckpointSource(where=str(model), error=TeacherError, again="download it again")
    return load_checked(kind, model, source, dtype=dtype).to(device), read


def _token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> torch.Tensor:
    ids_BT: torch.Tensor = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids_BT
