"""Creates metrics by name with the selected networks."""

from collections.abc import Sequence

import torch

from secondcast.evaluation.image_metrics.clip_score import ClipScore
from secondcast.evaluation.image_metrics.compbench import CompBench
from secondcast.evaluation.image_metrics.fid import ClipFeatures, Fid, InceptionFeatures
from secondcast.evaluation.image_metrics.metric import Metric, MetricName, Picture
from secondcast.evaluation.image_metrics.pocket import PocketScores
from secondcast.evaluation.image_metrics.recognisers import RapidOcr, Recogniser, Tesseract, TrOcr
from secondcast.evaluation.image_metrics.text_rendering import TextRendering
from secondcast.evaluation.image_metrics.vqa import AttributeBinding
from secondcast.evaluation.settings.networks import Networks


def metric_of(
    name: MetricName, networks: Networks, reference: Sequence[Picture], *, batch_size: int, device: torch.device
) -> Metric:
    """Create a metric by name without loading weights. reference: FID's reference images, may be empty."""
    match name:
        case "clip-score":
            return ClipScore(networks.clip_model, batch_size=batch_size, device=device)
        case "vqa":
            return AttributeBinding(networks.vqa_model, batch_size=batch_size, device=device)
        case "compbench":
            return CompBench(networks.vqa_model, networks.compbench_clip_model, batch_size=batch_size, device=device)
        case "text":
            return TextRendering(_recogniser(networks, device), batch_size=batch_size)
        case "pocket":
            return PocketScores()
        case "fid":
            features = (
                ClipFeatures(networks.clip_model, device=device)
                if networks.fid_features == "clip"
                else InceptionFeatures(networks.fid_weights, device=device)
            )
            return Fid(features, reference, batch_size=batch_size)


def _recogniser(networks: Networks, device: torch.device) -> Recogniser:
    match networks.ocr:
        case "rapidocr":
            return RapidOcr()
        case "tesseract":
            return Tesseract()
        case "trocr":
            return TrOcr(networks.ocr_model, device=device)
