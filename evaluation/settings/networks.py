"""The options that choose the networks of image metrics."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from secondcast.storage_schemas.schema.flags import Flag, Flags

OcrName = Literal["rapidocr", "tesseract", "trocr"]
FeaturesName = Literal["inception", "clip"]


class Networks(Flags):
    """The scoring networks, as folders or hub names."""

    # torchmetrics' default, too; Hessel et al. used ViT-B/32, whose values are not comparable.
    clip_model: str = Field(
        default="openai/clip-vit-large-patch14", description="Folder or hub name of the CLIP model."
    )
    # T2I-CompBench's weights, converted for transformers.
    vqa_model: str = Field(default="Salesforce/blip-vqa-base", description="Folder or hub name of the BLIP-VQA model.")
    # Of T2I-CompBench's CLIP similarity.
    compbench_clip_model: str = Field(
        default="openai/clip-vit-base-patch32", description="Folder or hub name of the CLIP model for compbench."
    )
    ocr: OcrName = Field(default="rapidocr", description="OCR engine that reads text in pictures.")
    ocr_model: str = Field(default="microsoft/trocr-base-printed", description="Folder or hub name of the TrOCR model.")
    fid_features: FeaturesName = Field(
        default="inception", description="Features for fid: inception, or clip (FID-CLIP, without torchvision)."
    )
    fid_weights: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Local file with Inception's weights; torch-fidelity downloads them otherwise."
    )
