"""Decode packed latents to pictures with the teacher's VAE, as its pipeline does, and encode control images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from secondcast.models.families.family import Family
from secondcast.models.geometry import Geometry, recorded_geometry
from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.models.weights.checked_loading import load_checked
from secondcast.storage_schemas.errors import TeacherError
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.recording import Sampling


class ImageDecoder:
    """The VAE for one geometry, in fp32."""

    def __init__(self, vae: Any, family: Family, geometry: Geometry) -> None:
        self._vae = vae.eval().requires_grad_(False)
        self._family, self._geometry = family, geometry

    @classmethod
    def load(cls, folder: TeacherFolder, geometry: Geometry, *, device: torch.device) -> Self:
        """Load `folder`/vae and nothing else."""
        part = folder.part("vae")
        vae = load_checked(getattr(diffusers, folder.family.vae), part, part_source(part), dtype=torch.float32)
        return cls(vae.to(device), folder.family, geometry)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """A context with the weights on another device."""
        before = self._vae.device
        self._vae.to(device)
        try:
            yield
        finally:
            self._vae.to(before)

    @torch.no_grad()
    def decode(self, latent_BSC: torch.Tensor) -> Array:
        """uint8 images, [B, H, W, 3], of packed latents of any float dtype."""
        parts = latent_BSC.split(self._geometry.decoded_at_once)
        return np.concatenate([self._decoded(part_BSC) for part_BSC in parts])

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Packed latents, [B, S, C], of RGB images, which are resized to the geometry as pipelines do.

        They are the means of the VAE's distribution. Pipelines draw from it, so that a control image has other latents
        in each call.
        """
        pixels = VaeImageProcessor(vae_scale_factor=1).preprocess(
            list(images), height=self._geometry.height, width=self._geometry.width
        )
        # A call of the encoder needs less memory than one of the decoder.
        parts = pixels.to(self._vae.device).split(self._geometry.decoded_at_once)
        latents = torch.cat([self._vae.encode(part).latent_dist.mode() for part in parts])
        return self._family.vae_output(latents, self._vae)

    def _decoded(self, latent_BSC: torch.Tensor) -> Array:
        packed_BSC = latent_BSC.to(device=self._vae.device, dtype=torch.float32)
        latents = self._family.vae_input(packed_BSC, self._geometry, self._vae)
        images = self._vae.decode(latents, return_dict=False)[0]
        images_BHWC = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return np.asarray((images_BHWC * 255).round().astype("uint8"))


def load_recorded_decoder(folder: TeacherFolder, sampling: Sampling, device: torch.device) -> ImageDecoder:
    """The decoder of a cache's latents; TeacherError for a VAE of another teacher."""
    config, family = folder.config("vae"), folder.family
    found = (family.token_channels(config), sampling.height * sampling.width // family.token_px(config) ** 2)
    if found != (sampling.channels, sampling.image_tokens):
        raise TeacherError(
            f"{folder.path}/vae decodes {found[1]} tokens of {found[0]} channels into {sampling.width} x "
            f"{sampling.height} pixels, but the cache has {sampling.image_tokens} of {sampling.channels}: it is the "
            "VAE of another teacher; give the folder of the recorded one"
        )
    return ImageDecoder.load(folder, recorded_geometry(sampling), device=device)
