"""FID and KID: distances between the features of the images and those of a reference set."""

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from secondcast.evaluation.image_metrics.clip_score import clip_pixels
from secondcast.evaluation.image_metrics.metric import MetricName, Needs, Picture, Scored, batches
from secondcast.evaluation.image_metrics.weights import WantedWeights
from secondcast.evaluation.pictures.restricted_pickles import restricted_pickles
from secondcast.storage_schemas.errors import MissingWeightsError, SettingsError
from secondcast.storage_schemas.io.digests import weight_sha256
from secondcast.storage_schemas.progress import Progress, counted

_EXTRA = "pip install 'secondcast[metrics]'"
_INCEPTION_WIDTH = 2048
# Of KID as published.
_SUBSET, _SUBSETS = 1000, 100
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Features(Protocol):
    """Image features that FID compares."""

    name: str
    needs: Needs

    def absent(self) -> str | None:
        """Why they are not available here, in one line with the fix; None if they are."""
        ...

    def metric(self) -> Any:
        """A FrechetInceptionDistance on the device that keeps its reference statistics."""
        ...

    def tensor(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Convert images of one size to the metric's input."""
        ...

    @property
    def width(self) -> int:
        """Number of features per image."""
        ...

    @property
    def model(self) -> str:
        """Name of the network."""
        ...

    @property
    def revision(self) -> str:
        """Commit, or digest of weights."""
        ...


class Fid:
    """Frechet distance of two Gaussians over features (Heusel et al. 2017, arXiv 1706.08500), by torchmetrics.

    And, from the same features, the kernel distance, whose expectation does not depend on the number of images (KID,
    Binkowski et al. 2018, arXiv 1801.01401), times 1000.
    """

    name: MetricName = "fid"

    def __init__(self, features: Features, reference: Sequence[Picture], *, batch_size: int) -> None:
        self._features, self._reference, self._batch_size = features, reference, batch_size
        self.needs = features.needs

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric. A missing reference is reported by `available`, once for all folders."""
        count, reference_count = len(pictures), len(self._reference)
        if reference_count and min(count, reference_count) < 2:
            raise SettingsError(
                f"fid of {counted(count, 'image')} against {reference_count}: expected at least two on each side"
            )

    def available(self) -> str | None:
        """See Metric."""
        if not self._reference:
            return _NO_REFERENCE
        return self._features.absent()

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric. There are no intervals: neither is a mean over images."""
        count, reference_count = len(pictures), len(self._reference)
        self.check(pictures)
        metric, reference_ND = self._of_reference(progress)
        metric.reset()
        found_ND = self._update(metric, pictures, progress, real=False)
        if min(count, reference_count) <= self._features.width:
            progress.say(
                f"fid of {counted(count, 'image')} against {reference_count}: {self._features.width} features need "
                f"more images than that on both sides; compare only values from the same numbers of images"
            )
        values = {"fid": max(0.0, float(metric.compute())), "kid": 1000 * _kernel_distance(reference_ND, found_ND)}
        of_features = "" if self._features.name == "inception" else f"-{self._features.name}"
        return [
            Scored(
                name=f"{name}{of_features}",
                mean=value,
                count=count,
                low=None,
                high=None,
                interval="none",
                model=self._features.model,
                revision=self._features.revision,
                library=_versions(self._features.needs.packages),
            )
            for name, value in values.items()
        ]

    def _of_reference(self, progress: Progress) -> tuple[Any, torch.Tensor]:
        if not hasattr(self, "_filled"):
            metric = self._features.metric()
            self._filled = metric, self._update(metric, self._reference, progress, real=True)
        return self._filled

    def _update(self, metric: Any, pictures: Sequence[Picture], progress: Progress, *, real: bool) -> torch.Tensor:
        """Add images to FID's statistics, and return their features, [N, D] float64 on the host."""
        title, seen = "fid, reference" if real else self.name, list[torch.Tensor]()
        hook = metric.inception.register_forward_hook(
            lambda _, given, features: seen.append(features.flatten(1).double().cpu())
        )
        with hook, progress.bar(title, total=len(pictures), done=0, unit="images") as bar:
            for batch in batches(pictures, self._batch_size):
                images = [picture.pixels() for picture in batch]
                # Images of different sizes cannot be stacked: process them one at a time.
                size = len(images) if len({image.size for image in images}) == 1 else 1
                with torch.inference_mode():
                    for part in batches(images, size):
                        metric.update(self._features.tensor(part), real=real)
                bar.advance(len(batch))
        return torch.cat(seen)


def _kernel_distance(reference_ND: torch.Tensor, found_ND: torch.Tensor) -> float:
    """The unbiased estimate of KID's squared distance, of all images or of the mean over subsets as published."""
    from torchmetrics.image.kid import poly_mmd

    size = min(len(reference_ND), len(found_ND), _SUBSET)
    if size == len(reference_ND) == len(found_ND):
        return float(poly_mmd(reference_ND, found_ND))
    draw, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(_SUBSETS):
        parts = [rows_ND[torch.randperm(len(rows_ND), generator=draw)[:size]] for rows_ND in (reference_ND, found_ND)]
        total += float(poly_mmd(*parts))
    return total / _SUBSETS


class InceptionFeatures:
    """InceptionV3's last pool, 2,048 features, weights and resizing as in torch-fidelity: FID as usually reported."""

    name: str = "inception"
    width = _INCEPTION_WIDTH
    model = "inception-v3-compat"

    def __init__(self, weights: Path | None, *, device: torch.device) -> None:
        self._file, self._device = weights, device
        self.needs = Needs(packages=("torchmetrics", "torch-fidelity", "torchvision"), weights=INCEPTION_FILE, how=_HOW)

    def absent(self) -> str | None:
        """See Features."""
        for package in ("torch_fidelity", "torchvision"):
            if find_spec(package) is None:
                return (
                    f"fid with Inception's features needs {package.replace('_', '-')}, which is not installed: "
                    f"{_EXTRA}, or --fid-features clip"
                )
        if self._file is not None and not self._file.is_file():
            return f"no file {self._file} for --fid-weights: expected {INCEPTION_FILE}, {_HOW}"
        return _torchmetrics_absent()

    @property
    def revision(self) -> str:
        """See Features."""
        file = self._file or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        return f"sha256:{weight_sha256(file)}" if file.is_file() else INCEPTION_FILE

    def metric(self) -> Any:
        """See Features."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        given = {} if self._file is None else {"feature_extractor_weights_path": str(self._file)}
        try:
            with restricted_pickles():
                # The default resizing matches no published FID.
                metric = FrechetInceptionDistance(
                    feature=self.width, reset_real_features=False, antialias=False, **given
                )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise MissingWeightsError(
                f"Inception's weights could not be loaded ({type(error).__name__}: {reason}): {_HOW}"
            ) from error
        return metric.to(self._device)

    def tensor(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """uint8 [B, 3, H, W]; torchmetrics resizes it to 299 px like TensorFlow 1: bilinear, without antialiasing."""
        pixels_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return pixels_BHWC.permute(0, 3, 1, 2).to(self._device)


class ClipFeatures:
    """CLIP's image embedding: FID-CLIP (Kynkäänniemi et al. 2023, arXiv 2203.06026). Does not need torchvision."""

    name: str = "clip"

    def __init__(self, model: str, *, device: torch.device) -> None:
        self._wanted = WantedWeights(model, flag="--clip-model", model_type="clip")
        self.model, self._device = model, device
        self.needs = Needs(packages=("torchmetrics", "transformers"), weights=model, how=self._wanted.how)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import CLIPModel

        weights = self._wanted.found
        return weights.network(CLIPModel, device=self._device), weights.image_processor()

    @property
    def width(self) -> int:
        """See Features."""
        return int(self._parts[0].config.projection_dim)

    @property
    def revision(self) -> str:
        """See Features."""
        return self._wanted.found.revision

    def absent(self) -> str | None:
        """See Features."""
        return self._wanted.absent() or _torchmetrics_absent()

    def metric(self) -> Any:
        """See Features."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = _PictureEmbedding(self._parts[0], self.width)
        return FrechetInceptionDistance(feature=network, reset_real_features=False).to(self._device)

    def tensor(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """See Features."""
        return clip_pixels(self._parts[1], images, self._device)


class _PictureEmbedding(torch.nn.Module):
    """CLIP's image embedding, [B, width], not normalised."""

    def __init__(self, clip: Any, width: int) -> None:
        super().__init__()
        self.vision, self.projection, self.num_features = clip.vision_model, clip.visual_projection, width

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.projection(self.vision(pixel_values=pixels_BCHW).pooler_output)


_NO_REFERENCE = "fid needs reference images: give --reference FOLDER, such as the teacher's images from generate"
_HOW = (
    "downloaded from github.com/toshas/torch-fidelity/releases if there is a network, else give the file "
    "with --fid-weights"
)


def _versions(packages: Sequence[str]) -> str:
    return ", ".join(f"{package} {version(package)}" for package in packages)


def _torchmetrics_absent() -> str | None:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        return f"fid needs {(error.name or 'torchmetrics').split('.')[0]}, which is not installed: {_EXTRA}"
    except Exception as error:
        # With torch-fidelity installed and torchvision missing or for another torch, the import itself fails.
        reason = " ".join(str(error).split())[:200]
        return f"fid: torchmetrics cannot be imported ({type(error).__name__}: {reason}): {_EXTRA}"
    if "antialias" not in signature(FrechetInceptionDistance).parameters:
        return f"fid needs torchmetrics 1.8 or newer, found {version('torchmetrics')}: {_EXTRA}"
    return None
