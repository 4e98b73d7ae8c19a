"""Merges a LoRA of a transformer, in any form that the family's pipeline reads, into the transformer's weights."""

import logging
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from safetensors import SafetensorError

from secondcast.models.families.family import Family
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError, reason

_PREFIX = "transformer."
# What diffusers and peft raise for files, names and shapes that they do not know.
_UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) as its pipeline reads it.

    weights: of the transformer, by diffusers' names.
    given: its alphas and the metadata of its file, as `load_lora_into_transformer` takes them.
    others: number of tensors for other parts, such as CLIP, which are not used.
    scale: factor of the difference to the weights.
    """

    file: Path
    pipeline: str
    weights: dict[str, torch.Tensor]
    given: dict[str, Any]
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
        if not file.is_file():
            why = "it is a folder" if file.is_dir() else "no such file"
            raise SettingsError(f"--lora {file} cannot be read ({why}): expected a safetensors file of a LoRA")
        # Other pipelines than FLUX.1's multiply the alphas in.
        wanted = ["metadata"]
        if "network_alphas" in signature(pipeline.load_lora_into_transformer).parameters:
            wanted.insert(0, "network_alphas")
        asked = {"return_alphas": True} if len(wanted) == 2 else {}
        try:
            # By its path: the metadata of the file has the alpha of its training.
            read, *given = _quietly(
                pipeline.lora_state_dict, str(file.parent), weight_name=file.name, use_safetensors=True,
                local_files_only=True, return_lora_metadata=True, **asked,
            )  # fmt: skip
        except _UNREADABLE as error:
            raise SettingsError(
                f"--lora {file} cannot be read ({reason(error)}): expected a safetensors file of a LoRA of this model"
            ) from error
        weights = {name: tensor for name, tensor in read.items() if name.startswith(_PREFIX)}
        if not weights:
            raise SettingsError(
                f"--lora {file} has no weights of the transformer of {family.pipeline}, but "
                f"{next(iter(read), 'nothing')}: expected a LoRA of this model"
            )
        return cls(
            file=file, pipeline=family.pipeline, weights=weights, given=dict(zip(wanted, given, strict=True)),
            others=len(read) - len(weights), scale=scale,
        )  # fmt: skip

    @torch.no_grad()
    def merge_into(self, transformer: Any) -> None:
        """Add the scaled difference to the transformer's weights. Raises SettingsError for a LoRA of another model."""
        modules = dict(transformer.named_modules())
        changed = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in self.weights}
        # diffusers would leave these out with a warning.
        if unknown := sorted(changed - modules.keys()):
            raise SettingsError(
                f"--lora {self.file} changes {unknown[0]}, which this transformer does not have ({len(unknown)} of "
                f"{len(changed)} modules): expected a LoRA of this model"
            )
        load = getattr(diffusers, self.pipeline).load_lora_into_transformer
        try:
            _quietly(load, self.weights, transformer=transformer, adapter_name="lora", **self.given)
        except _UNREADABLE as error:
            raise SettingsError(
                f"--lora {self.file} does not fit the transformer ({' '.join(str(error).split())[:200]}): expected a "
                f"LoRA of this model"
            ) from error
        transformer.fuse_lora(lora_scale=self.scale)
        transformer.unload_lora()


def _quietly(call: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function of diffusers without its log lines: what they warn of is an error here."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return call(*arguments, **named)
    finally:
        logger.setLevel(before)
