"""Families whose large text encoder is T5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secondcast.models.families.encoders.interface import TextTokenizer
from secondcast.models.families.family import Family, Part

if TYPE_CHECKING:
    import torch

    from secondcast.models.weights.files import CheckpointSource


def t5_part(folder: str) -> Part:
    """T5 as the large text encoder."""
    needs = ("d_model", "vocab_size")
    return Part(folder=folder, key="model_type", kind="t5", needs=needs, loaded_as="T5EncoderModel")


class ReadsT5(Family):
    """A family that reads T5's last layer. See Family for each method."""

    def encoder_width(self, encoder_config: Mapping[str, Any]) -> int:
        """That of T5."""
        width: int = encoder_config["d_model"]
        return width

    def pad_token_id(self, encoder_config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> int:
        """That of T5's configuration."""
        return int(encoder_config.get("pad_token_id") or 0)

    def tokenizer(self, folder: Path) -> TextTokenizer:
        """T5's."""
        from secondcast.models.families.encoders.t5 import T5Tokens

        return T5Tokens(folder, self.cleaned)

    def cleaned(self, texts: Sequence[str]) -> list[str]:
        """Texts as the pipeline tokenises them; MissingExtraError if that needs another package."""
        return list(texts)

    def load_text_encoder(self, folder: Path, source: "CheckpointSource", dtype: "torch.dtype") -> Any:
        """T5EncoderModel."""
        from secondcast.models.families.encoders.t5 import load_t5

        return load_t5(folder, source, dtype)

    def make_text_encoder(self, config: Mapping[str, Any]) -> Any:
        """T5EncoderModel."""
        from secondcast.models.families.encoders.t5 import make_t5

        return make_t5(config)

    def encode(self, text_encoder: Any, token_ids_BT: "torch.Tensor", pad_token_id: int) -> "torch.Tensor":
        """T5's last layer; zero for padding that is masked."""
        from secondcast.models.families.encoders.t5 import encode_with_t5

        return encode_with_t5(text_encoder, token_ids_BT, masked=self.masks_text)
