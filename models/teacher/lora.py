"""Merges a LoRA of a transformer, in any form that the family's pipeline reads, into the transformer's weights."""

import logging
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from secondcast.models.families.family import Family
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError, reason

_PREFIX = "transformer."


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) as its pipeline reads it.

    weights: of the transformer, by diffusers' names.
    alphas: alpha of each module; None where the file has none.
    others: number of tensors for other parts, such as CLIP, which are not used.
    scale: factor of the difference to the weights.
    """

    file: Path
    pipeline: str
    weights: dict[str, torch.Tensor]
    alphas: dict[str, float] | None
    others: int
    scale: float

    @classmethod
    def read(cls, file: Path, family: Family, scale: float) -> Self:
        """Read a safetensors file. Raises SettingsError, MissingExtraError."""
        pipeline = getattr(diffusers, family.pipeline)
        if not hasattr(pipeline, "load_lora_into_transformer"):
            raise SettingsError(f"--lora is given, but diffusers' {family.pipeline} does not load LoRAs: omit it")
        if not diffusers.utils.USE_PEFT_BACKEND:
            raise MissingExtraError("--lora needs peft, which is not installed: pip install 'secondcast[lora]'")
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"--lora {file} cannot be read ({reason(error)}): expected a safetensors file of a LoRA"
            ) from error
        asked = {"return_alphas": True} if _takes_alphas(pipeline) else {}
        found: Any = _quietly(pipeline.lora_state_dict, tensors, **asked)
        read, alphas = found if isinstance(found, tuple) else (found, None)
        weights = {name: tensor for name, tensor in read.items() if name.startswith(_PREFIX)}
        if not weights:
            raise SettingsError(
                f"--lora {file} has no weights of the transformer of {family.pipeline}, but "
                f"{next(iter(tensors), 'nothing')}: expected a LoRA of this model"
            )
        return cls(
            file=file, pipeline=family.pipeline, weights=weights, alphas=alphas or None,
            others=len(read) - len(weights), scale=scale,
        )  # fmt: skip

    @torch.no_grad()
    def merge_into(self, transformer: Any) -> None:
        """Add the scaled difference to the transformer's weights. Raises SettingsError for a LoRA of another model."""
        pipeline = getattr(diffusers, self.pipeline)
        alphas = {"network_alphas": self.alphas} if _takes_alphas(pipeline) else {}
        try:
            _quietly(
                pipeline.load_lora_into_transformer,
                self.weights,
                transformer=transformer,
                adapter_name="lora",
                **alphas,
            )
        # peft and diffusers raise several kinds for names and shapes that do not fit.
        except (RuntimeError, ValueError, KeyError) as error:
            raise SettingsError(
                f"--lora {self.file} does not fit the transformer ({' '.join(str(error).split())[:200]}): expected a "
                f"LoRA of this model"
            ) from error
        transformer.fuse_lora(lora_scale=self.scale)
        transformer.unload_lora()


def _takes_alphas(pipeline: Any) -> bool:
    """Whether alphas are apart from the weights; other pipelines multiply them in."""
    return "network_alphas" in signature(pipeline.load_lora_into_transformer).parameters


def _quietly(call: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function of diffusers without its log lines: its errors are reported as ours."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return call(*arguments, **named)
    finally:
        logger.setLevel(before)
