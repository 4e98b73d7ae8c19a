"""The teacher's text encoders, which encode prompts exactly as its pipeline does."""

from typing import Any, Self

import torch

from secondcast.models.families.encoders.interface import ConditioningEncoder
from secondcast.models.families.family import Family
from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.storage_schemas.schema.recording import Pooled


def load_conditioning_encoder(
    folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device
) -> ConditioningEncoder:
    """The text encoders of a teacher beside the large one, and nothing else."""
    roles = [role for pair in folder.family.conditioning_roles for role in pair]
    return folder.family.conditioning_encoder({role: folder.part(role) for role in roles}, dtype=dtype, device=device)


class TeacherTextEncoder:
    """The large text encoder of a teacher, frozen, and the text encoders beside it if they are needed."""

    def __init__(
        self, model: Any, family: Family, *, pad_token_id: int, conditioning: ConditioningEncoder | None = None
    ) -> None:
        self.model, self.conditioning = model.eval().requires_grad_(False), conditioning
        self._family, self._pad_token_id = family, pad_token_id

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.model.device)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The large one, and those beside it that are loaded."""
        return [self.model, *([] if self.conditioning is None else self.conditioning.networks)]

    @classmethod
    def load(cls, folder: TeacherFolder, *, dtype: torch.dtype, device: torch.device, pooled: Pooled = "zero") -> Self:
        """Load the large text encoder, and those beside it if `pooled` is "clip"; nothing else."""
        part = folder.part("large_text_encoder")
        model = folder.family.load_text_encoder(part, part_source(part), dtype)
        beside = load_conditioning_encoder(folder, dtype=dtype, device=device) if pooled == "clip" else None
        return cls(model.to(device), folder.family, pad_token_id=folder.pad_token_id, conditioning=beside)

    def encode(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of padded token ids."""
        return self._family.encode(self.model, token_ids_BT.to(self.device), self._pad_token_id)
