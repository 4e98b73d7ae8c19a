"""Distances between two images: PSNR, SSIM and, if its network is available, LPIPS."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secondcast.evaluation.pictures.restricted_pickles import restricted_pickles
from secondcast.storage_schemas.errors import MissingExtraError, SettingsError
from secondcast.storage_schemas.schema.fields import Array

if TYPE_CHECKING:
    import torch

# The window of Wang et al. 2004 is 11 pixels wide.
_WINDOW = 11
# AlexNet's poolings reduce smaller images to nothing.
_SMALLEST_FOR_ALEXNET = 31


def check_measurable(height: int, width: int, *, instead: str = "give --closed-loop 0") -> None:
    """Raise MissingExtraError without scikit-image, SettingsError for images smaller than SSIM's window.

    instead: the alternative offered by the message.
    """
    if find_spec("skimage") is None:
        raise MissingExtraError(
            "PSNR and SSIM of the closed loop need scikit-image, which is not installed: pip install "
            f"'secondcast[metrics]', or {instead}"
        )
    if min(height, width) < _WINDOW:
        raise SettingsError(
            f"the images of the cache have {height} x {width} pixels, SSIM needs {_WINDOW} x {_WINDOW}: {instead}"
        )


def psnr_db(picture_HWC: Array, wanted_HWC: Array) -> float | None:
    """Peak signal-to-noise ratio of uint8 images in decibels; None if they are identical (infinite)."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(picture_HWC, wanted_HWC):
        return None
    return float(peak_signal_noise_ratio(wanted_HWC, picture_HWC, data_range=255))


def ssim(picture_HWC: Array, wanted_HWC: Array) -> float:
    """Structural similarity of uint8 images, mean over colours; 1 if they are identical.

    Source: Wang et al. 2004, with their Gaussian window (sigma 1.5, 11 pixels) and population covariances.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            picture_HWC, wanted_HWC, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
    )  # fmt: skip


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018) with AlexNet; nothing is downloaded."""

    def __init__(self, device: "torch.device") -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        with restricted_pickles():
            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        self._metric: Any = metric.to(device)
        self._device = device

    def __call__(self, picture_HWC: Array, wanted_HWC: Array) -> float:
        """The distance of two uint8 images."""
        import torch

        both = [
            torch.from_numpy(array).to(self._device).permute(2, 0, 1)[None].float() / 255
            for array in (picture_HWC, wanted_HWC)
        ]
        with torch.no_grad():
            value = float(self._metric(*both))
        self._metric.reset()
        return value


def lpips_missing(height: int, width: int) -> str | None:
    """What LPIPS lacks for images of this size, in one line; None if it is available."""
    if (side := min(height, width)) < _SMALLEST_FOR_ALEXNET:
        return f"no LPIPS: AlexNet needs images of at least {_SMALLEST_FOR_ALEXNET} pixels, these have {side}"
    packages = [name for name in ("torchvision", "torchmetrics") if find_spec(name) is None]
    if packages:
        return f"no LPIPS: it needs {' and '.join(packages)}; pip install {' '.join(packages)}"
    try:
        from torchvision.models import AlexNet_Weights
    except Exception as error:
        # A torchvision for another torch fails at import, after the errors by step were computed.
        reason = " ".join(str(error).split())[:200]
        return (
            f"no LPIPS: torchvision cannot be imported ({type(error).__name__}: {reason}); install the torchvision "
            f"that matches torch"
        )

    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    if not weights.is_file():
        return f"no LPIPS: it needs AlexNet's weights in {weights}; download them from {AlexNet_Weights.DEFAULT.url}"
    return None
