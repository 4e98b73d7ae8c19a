"""From pixels to image tokens."""

from dataclasses import dataclass

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.recording import Sampling

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


def geometry_of(*, height: int, width: int, token_px: int, channels: int) -> Geometry:
    """The geometry of an image size; SettingsError unless it divides into image tokens of token_px x token_px."""
    for name, pixels in (("height", height), ("width", width)):
        if pixels < token_px or pixels % token_px:
            lower = max(token_px, pixels // token_px * token_px)
            raise SettingsError(
                f"{name} is {pixels}, expected a multiple of {token_px}: this teacher packs {token_px} x {token_px} "
                f"pixels into an image token; use {lower} or {lower + token_px}"
            )
    return Geometry(height=height, width=width, rows=height // token_px, columns=width // token_px, channels=channels)


def recorded_geometry(sampling: Sampling) -> Geometry:
    """The geometry of a cache: rows and columns follow from height, width and image tokens."""
    # height / rows == width / columns == pixels per token side, and rows * columns == image tokens.
    side = round((sampling.height * sampling.width / sampling.image_tokens) ** 0.5)
    return geometry_of(height=sampling.height, width=sampling.width, token_px=side, channels=sampling.channels)
