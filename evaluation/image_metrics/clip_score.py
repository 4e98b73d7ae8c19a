"""CLIP-Score: similarity of an image and its prompt according to CLIP."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from secondcast.evaluation.image_metrics.metric import (
    MetricName,
    Needs,
    Picture,
    Scored,
    batches,
    mean_of,
    with_prompts,
)
from secondcast.evaluation.image_metrics.weights import WantedWeights
from secondcast.storage_schemas.progress import Progress


class ClipScore:
    """100 * max(cos, 0) of CLIP's embeddings of image and prompt.

    Hessel et al. 2021 (arXiv 2104.08718) without their factor 2.5, in percent, as in torchmetrics.
    """

    name: MetricName = "clip-score"

    def __init__(self, model: str, *, batch_size: int, device: torch.device, flag: str = "--clip-model") -> None:
        self._wanted = WantedWeights(model, flag=flag, model_type="clip")
        self._batch_size, self._device = batch_size, device
        self.needs = Needs(packages=("transformers",), weights=model, how=self._wanted.how)

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric."""
        with_prompts(self.name, pictures)

    def available(self) -> str | None:
        """See Metric."""
        return self._wanted.absent()

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric. Prompts are truncated to CLIP's text length."""
        cosines = self.cosines(pictures, progress)
        # In float32, as torchmetrics computes it.
        scores_N = (100 * torch.tensor(list(cosines.values())).clamp(min=0)).tolist()
        values = dict(zip(cosines, scores_N, strict=True))
        return [mean_of(self.name, values, model=self._wanted.source, revision=self.revision)]

    @property
    def revision(self) -> str:
        """Of the weights."""
        return self._wanted.found.revision

    def cosines(self, pictures: Sequence[Picture], progress: Progress) -> dict[str, float]:
        """Cosine of CLIP's embeddings of image and prompt, by Picture.name."""
        pairs = with_prompts(self.name, pictures)
        network, tokenizer, processor = self._parts
        length = network.config.text_config.max_position_embeddings
        if cut := sum(len(ids) > length for ids in tokenizer([prompt for _, prompt in pairs]).input_ids):
            progress.say(
                f"clip-score: {cut} of {len(pairs)} prompts are longer than CLIP's {length} tokens and were truncated"
            )
        values: dict[str, float] = {}
        with progress.bar(self.name, total=len(pairs), done=0, unit="images") as bar:
            for batch in batches(pairs, self._batch_size):
                images = [picture.pixels() for picture, _ in batch]
                tokens = tokenizer(
                    [prompt for _, prompt in batch],
                    padding=True, truncation=True, max_length=length, return_tensors="pt",
                ).to(self._device)  # fmt: skip
                with torch.inference_mode():
                    found = network(pixel_values=clip_pixels(processor, images, self._device), **tokens)
                # Both are already normalised.
                cosine_B = (found.image_embeds * found.text_embeds).sum(dim=-1)
                values.update({picture.name: x for (picture, _), x in zip(batch, cosine_B.tolist(), strict=True)})
                bar.advance(len(batch))
        return values

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPModel

        weights = self._wanted.found
        return weights.network(CLIPModel, device=self._device), weights.tokenizer(), weights.image_processor()


def clip_pixels(processor: Any, images: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
    """Preprocess images for a network, float32 [B, 3, H, W]."""
    return processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
