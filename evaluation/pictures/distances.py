"""How far two pictures are apart: PSNR, SSIM and, where its network is at hand, LPIPS."""

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
# Of smaller pictures AlexNet's poolings leave nothing.
_SMALLEST_FOR_ALEXNET = 31


def check_measurable(height: int, width: int, *, instead: str = "give --closed-loop 0") -> None:
    """Raise MissingExtraError without scikit-image, SettingsError for pictures that SSIM's window does not fit into.

    instead: what a user may do who wants neither.
    """
    if find_spec("skimage") is None:
        raise MissingExtraError(
            "PSNR and SSIM of the closed loop need scikit-image, which is not installed: pip install "
            f"'secondcast[metrics]', or {instead}"
        )
    if min(height, width) < _WINDOW:
        raise SettingsError(
            f"the pictures of the cache are {height} x {width} pixels, SSIM looks at {_WINDOW} x {_WINDOW}: {instead}"
        )


def psnr_db(picture_HWC: Array, wanted_HWC: Array) -> float | None:
    """Peak signal to noise ratio of uint8 pictures in decibels; None where they are identical: it is infinite."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(picture_HWC, wanted_HWC):
        return None
    return float(peak_signal_noise_ratio(wanted_HWC, picture_HWC, data_range=255))


def ssim(picture_HWC: Array, wanted_HWC: Array) -> float:
    """Structural similarity of uint8 pictures, mean over colours; 1 where they are identical.

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
        """The distance of two uint8 pictures."""
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
    """What LPIPS wants for pictures of this size that is not here, in one line; None where all is at hand."""
    if (side := min(height, width)) < _SMALLEST_FOR_ALEXNET:
        return f"no LPIPS: AlexNet takes pictures from {_SMALLEST_FOR_ALEXNET} pixels on, these have {side}"
    packages = [name for name in ("torchvision", "torchmetrics") if find_spec(name) is None]
    if packages:
        return f"no LPIPS: it needs {' and '.join(packages)}; pip install {' '.join(packages)}"
    try:
        from torchvision.models import AlexNet_Weights
    except Exception as error:
        # A torchvision of another torch fails at its import; the errors by step are computed by then.
        reason = " ".join(str(error).split())[:200]
        return f"no LPIPS: torchvision cannot be imported ({type(error).__name__}: {reason}); install torch's own"

    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    if not weights.is_file():
        return f"no LPIPS: it needs AlexNet's weights in {weights}; fetch them from {AlexNet_Weights.DEFAULT.url}"
    return None
