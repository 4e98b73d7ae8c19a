"""A saved student as a function of prompts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from secondcast.models.families.registry import FAMILIES
from secondcast.models.student.student import Student, load_student
from secondcast.models.student.tokens import has_tokenizer, own_tokens
from secondcast.storage_schemas.errors import StudentError, TeacherError


class PromptEncoder:
    """Gives the embeddings of prompts as a transformer reads them in place of the teacher's.

    network: the student, a torch.nn.Module in eval mode: token ids [B, T] in, a tuple with the embeddings out.
    text_length: number of tokens T; longer prompts are truncated.
    device: of the network.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load a saved student and its tokenizer; StudentError if one of them is missing or damaged."""
        self.network: Student = load_student(folder).to(device)
        self.device, self.text_length = device, int(self.network.config.text_length)
        self._own = own_tokens(folder, self.network)
        if self._own is not None:
            return
        if not has_tokenizer(folder):
            # transformers would make one with an empty vocabulary.
            raise StudentError(
                f"{folder} has a student without tokenizer, expected tokenizer.json or spiece.model: give a run "
                f"folder, or put the teacher's tokenizer beside the student's config.json"
            )
        layers = getattr(self.network.config, "hidden_state_layers", None)
        kind = (None if layers is None else tuple(layers), getattr(self.network.config, "masks_padding", False))
        family = next(one for one in FAMILIES if (one.text_layers, one.masks_text) == kind)
        try:
            self._teachers = family.tokenizer(folder)
        except TeacherError as error:
            raise StudentError(f"the tokenizer of the student {folder} cannot be read: {error}") from error

    def token_ids(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """token_ids_BT, int64, truncated and padded to the text length, on the host."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._own is not None:
            return self._own.batch(texts)
        return self._teachers.padded(texts, self.text_length)

    def __call__(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """encoder_hidden_states_BTD of a prompt or several, fp32 on the device, without gradients."""
        with torch.no_grad():
            embedding_BTD: torch.Tensor = self.network(self.token_ids(prompts).to(self.device))[0]
        return embedding_BTD
