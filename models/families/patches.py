"""Families whose transformer takes unpacked latents and makes an image token of 2 x 2 of them itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secondcast.models.families.family import LATENTS_PER_SIDE as _PATCH
from secondcast.models.families.reads_t5 import ReadsT5
from secondcast.storage_schemas.errors import TeacherError

if TYPE_CHECKING:
    import torch

    from secondcast.models.geometry import Geometry


class PatchedLatents(ReadsT5):
    """A family with [B, channels, height, width] latents, which caches have packed like the transformer's tokens."""

    def check_patches(self, config: Mapping[str, Any], file: str) -> None:
        """Raise TeacherError for a transformer with another size of patches."""
        if (patch := config["patch_size"]) != _PATCH:
            raise TeacherError(
                f"{file} has patch_size = {patch}, expected {_PATCH}: it is none of {', '.join(self.models)}; give one "
                f"of them"
            )

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C: the channels of a patch."""
        return int(config["in_channels"]) * int(config["patch_size"]) ** 2

    def unpacked(self, latent_BSC: "torch.Tensor", geometry: "Geometry") -> "torch.Tensor":
        """[B, channels, height, width] in latents."""
        batch, rows, columns = len(latent_BSC), geometry.rows, geometry.columns
        patches = latent_BSC.reshape(batch, rows, columns, -1, _PATCH, _PATCH).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, -1, rows * _PATCH, columns * _PATCH)

    def packed(self, latent: "torch.Tensor") -> "torch.Tensor":
        """[B, S, C]: channels, then rows and columns of a patch."""
        batch, channels, height, width = latent.shape
        patches = latent.reshape(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * _PATCH**2)

    def positions(
        self, geometry: "Geometry", text_length: int, *, device: "torch.device", dtype: "torch.dtype"
    ) -> "dict[str, Any]":
        """The geometry, of which the transformer reads height and width from the latent."""
        return {"geometry": geometry}
