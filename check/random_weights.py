"""Networks with random weights made on the device from configurations: full size without a download."""

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import diffusers
import torch

from secondcast.models.families.encoders.interface import ConditioningEncoder
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.schema.fields import Field

_SEED = 0


def random_transformer(folder: TeacherFolder, dtype: torch.dtype, device: torch.device, home: torch.device) -> Any:
    """The transformer, the same weights each time.

    device: where they are made, part by part. home: where each part is left.
    """
    with torch.device("meta"):
        model = getattr(diffusers, folder.family.transformer).from_config(folder.config("transformer"))
    parts: list[torch.nn.Module] = []
    for child in model.children():
        parts += child if isinstance(child, torch.nn.ModuleList) else [child]
    _fill(parts, dtype, device, home)
    for name, parameter in model.named_parameters(recurse=False):
        made = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(_SEED)).to(home, dtype)
        setattr(model, name, torch.nn.Parameter(made * parameter[0].numel() ** -0.5))
    return model.eval().requires_grad_(False)


class RandomConditioning(ConditioningEncoder):
    """Random rows in place of those of text encoders beside the large one, the same for a text each time."""

    def __init__(self, fields: Sequence[Field], dtype: torch.dtype, device: torch.device) -> None:
        self.networks = []
        self._fields, self._dtype, self._device = fields, dtype, device

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See ConditioningEncoder."""
        return {field.name: torch.stack([self._row(field, text) for text in texts]) for field in self._fields}

    def _row(self, field: Field, text: str) -> torch.Tensor:
        draw = torch.Generator().manual_seed(crc32(f"{field.name} {text}".encode()))
        return torch.randn(field.row_shape, generator=draw).to(self._device, self._dtype)


def random_text_encoder(folder: TeacherFolder, dtype: torch.dtype, device: torch.device) -> Any:
    """The large text encoder, the same weights each time."""
    with torch.device("meta"):
        model = folder.family.make_text_encoder(folder.config("large_text_encoder"))
    _fill([model], dtype, device, device)
    # What had two names on the meta device has two copies now.
    model.tie_weights()
    return model


def random_vae(folder: TeacherFolder, device: torch.device) -> Any:
    """The VAE, in fp32 as images are decoded."""
    with torch.device("meta"):
        model = getattr(diffusers, folder.family.vae).from_config(folder.config("vae"))
    _fill([model], torch.float32, device, device)
    return model.eval()


def _fill(modules: Iterable[torch.nn.Module], dtype: torch.dtype, device: torch.device, home: torch.device) -> None:
    """Random matrices that keep the size of what passes; norms 1, biases 0."""
    draw = torch.Generator(device).manual_seed(_SEED)
    for module in modules:
        module.to(dtype).to_empty(device=device)
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=draw)
            else:
                parameter.data.fill_(float(name.endswith("weight")))
        for name, buffer in module.named_buffers():
            # Embeddings of positions, of the size of what they are added to; variances are of noise.
            if buffer.is_floating_point():
                buffer.fill_(1) if name.endswith("running_var") else buffer.normal_(generator=draw)
        module.to(home)
