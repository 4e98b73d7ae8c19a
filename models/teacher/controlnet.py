"""A ControlNet of FLUX.1 (Zhang et al. 2023, arXiv 2302.05543): what an image adds to the transformer's blocks."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import diffusers
import torch

from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.weights.checked_loading import LOADING_FAILS, check_weights, load_checked
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import SettingsError, reason
from secondcast.storage_schemas.io.digests import digest, weight_sha256

_CONFIG = "config.json"
# Keys that it must have in common with the transformer, whose inputs it reads and to whose blocks it adds.
_SHARED = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
# Keys of kinds that are called in another way, and what these kinds are.
_OTHERS = {
    "num_mode": "a union ControlNet, which needs a mode for each image",
    "conditioning_embedding_channels": "one that reads pixels and not the VAE's latents",
}


@dataclass(frozen=True, kw_only=True)
class ControlNet:
    """A loaded ControlNet; scale: factor of what it adds."""

    network: Any
    scale: float


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet with the packed latents of the control images of a batch."""

    controlnet: ControlNet
    latent_BSC: torch.Tensor

    def bound_to(
        self,
        transformer: Any,
        hidden_states_BSC: torch.Tensor,
        encoder_hidden_states_BTD: torch.Tensor,
        pooled_projections_BP: torch.Tensor,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        positions: Mapping[str, torch.Tensor],
    ) -> Any:
        """The transformer with what the ControlNet adds in this call. Source: FluxControlNetPipeline.__call__."""
        network = self.controlnet.network
        double, single = network(
            hidden_states=hidden_states_BSC,
            controlnet_cond=self.latent_BSC.to(hidden_states_BSC),
            conditioning_scale=self.controlnet.scale,
            timestep=timestep_B,
            # Its own, whatever the transformer takes.
            guidance=guidance_B if network.config.guidance_embeds else None,
            pooled_projections=pooled_projections_BP,
            encoder_hidden_states=encoder_hidden_states_BTD,
            return_dict=False,
            **positions,
        )
        return partial(transformer, controlnet_block_samples=double, controlnet_single_block_samples=single)


@dataclass(frozen=True, kw_only=True)
class ControlNetFolder:
    """A folder with config.json and weights of a FluxControlNetModel that fits a transformer.

    config: with the defaults of diffusers. scale: factor of what it adds.
    """

    folder: Path
    config: Mapping[str, Any]
    scale: float
    parameters: int

    @classmethod
    def read(cls, folder: Path, teacher: TeacherFolder, scale: float) -> Self:
        """Read configuration and headers of the weights. Raises SettingsError."""
        kind = teacher.family.controlnet
        if kind is None:
            raise SettingsError(
                f"--controlnet is given, but {teacher.family.title} takes none here: omit it, or give FLUX.1-dev or "
                f"FLUX.1-schnell as the teacher"
            )
        # diffusers' own class of ControlNets still takes it from where it was.
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
        config = _config(folder, kind)
        for key, what in _OTHERS.items():
            if config[key] is not None:
                raise SettingsError(
                    f"--controlnet {folder} has {key} = {config[key]}, expected null: it is {what}; give another, "
                    f"such as FLUX.1-dev-ControlNet-Union-Pro-2.0, which has neither key"
                )
        _check_fits(folder, config, teacher.config("transformer"))
        stored = check_weights(getattr(diffusers, kind), folder, _source(folder))
        parameters = sum(math.prod(tensor.shape) for tensor in stored.tensors.values())
        return cls(folder=folder, config=config, scale=scale, parameters=parameters)

    @property
    def takes_guidance(self) -> bool:
        """Whether it reads the guidance scale, which a transformer such as schnell's may not."""
        return bool(self.config["guidance_embeds"])

    @property
    def digest(self) -> str:
        """Of its configuration and weights."""
        weights = {file.name: weight_sha256(file) for file in sorted(self.folder.glob("*.safetensors"))}
        return digest([{key: value for key, value in self.config.items() if not key.startswith("_")}, weights])

    def added_bytes(self, image_tokens: int, itemsize: int) -> int:
        """Bytes of what it adds to the blocks in one call with one image.

        At its end it has three of each: the output of a block, its projection, and that times the scale.
        """
        layers = self.config["num_layers"] + self.config["num_single_layers"]
        return int(3 * layers * image_tokens * _inner_width(self.config) * itemsize)

    def load(self, *, dtype: torch.dtype, device: torch.device) -> ControlNet:
        """Load the network in eval mode, frozen. Raises SettingsError."""
        network = load_checked(diffusers.FluxControlNetModel, self.folder, _source(self.folder), dtype=dtype)
        return ControlNet(network=network.to(device).eval().requires_grad_(False), scale=self.scale)


def _source(folder: Path) -> CheckpointSource:
    return CheckpointSource(where=f"--controlnet {folder}", error=SettingsError, again="download it again")


def _config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration with every key of the class."""
    network = getattr(diffusers, kind)
    if not (folder / _CONFIG).is_file():
        raise SettingsError(
            f"--controlnet {folder} has no {_CONFIG}: expected the folder of a {kind}, with {_CONFIG} and safetensors"
        )
    try:
        stated = network.load_config(folder, local_files_only=True)
        if (found := stated.get("_class_name")) != kind:
            raise SettingsError(
                f"--controlnet {folder / _CONFIG} has _class_name = {found!r}, expected {kind!r}: give a ControlNet of "
                f"FLUX.1 in the layout of diffusers"
            )
        with torch.device("meta"):
            return dict(network.from_config(stated).config)
    except LOADING_FAILS as error:
        raise SettingsError(
            f"--controlnet {folder / _CONFIG} is not the configuration of a {kind} ({reason(error)}): download it again"
        ) from error


def _check_fits(folder: Path, config: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    pairs = {key: (config[key], transformer[key]) for key in _SHARED}
    heads = "num_attention_heads * attention_head_dim"
    pairs[heads] = (_inner_width(config), _inner_width(transformer))
    for key, (found, expected) in pairs.items():
        if found != expected:
            raise SettingsError(
                f"--controlnet {folder} has {key} = {found}, expected {expected} as in the transformer: it is a "
                f"ControlNet of another model"
            )


def _inner_width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])
