"""From pixels to packed image tokens, as FluxPipeline does it: the VAE shrinks, 2 x 2 latents make a token."""

from dataclasses import dataclass
from typing import Any

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.manifest import Sampling

_PIXELS_AT_ONCE = 512 * 512


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Height and width in pixels; rows and columns in image tokens; channels of a packed token."""

    height: int
    width: int
    rows: int
    columns: int
    channels: int

    @property
    def decoded_at_once(self) -> int:
        """Images that the VAE decodes in one call: in fp32 it needs gigabytes per image of 1024 px."""
        return max(1, _PIXELS_AT_ONCE // (self.height * self.width))

    @property
    def image_tokens(self) -> int:
        """S."""
        return self.rows * self.columns


def vae_scale_factor(vae_config: dict[str, Any]) -> int:
    """Pixels per latent: 2 for each block of the VAE after the first."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def geometry_of(*, height: int, width: int, scale_factor: int, channels: int) -> Geometry:
    """The geometry of an image size; SettingsError unless it divides into image tokens."""
    token = 2 * scale_factor
    for name, pixels in (("height", height), ("width", width)):
        if pixels < token or pixels % token:
            lower = max(token, pixels // token * token)
            raise SettingsError(
                f"{name} is {pixels}, expected a multiple of {token}: this teacher packs {token} x {token} pixels "
                f"into an image token; use {lower} or {lower + token}"
            )
    return Geometry(height=height, width=width, rows=height // token, columns=width // token, channels=channels)


def recorded_geometry(sampling: Sampling) -> Geometry:
    """The geometry of a cache: rows and columns follow from height, width and image tokens."""
    # height / rows == width / columns == pixels per token side, and rows * columns == image tokens.
    side = round((sampling.height * sampling.width / sampling.image_tokens) ** 0.5)
    return geometry_of(height=sampling.height, width=sampling.width, scale_factor=side // 2, channels=sampling.channels)
