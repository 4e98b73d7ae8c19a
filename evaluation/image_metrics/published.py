"""Default scoring networks, published on the hub."""

from typing import Literal

OcrName = Literal["rapidocr", "tesseract", "trocr"]
FeaturesName = Literal["inception", "clip"]
# Also torchmetrics' default; Hessel et al. used ViT-B/32, whose values are not comparable.
CLIP_MODEL = "openai/clip-vit-large-patch14"
# Of T2I-CompBench's CLIP similarity.
COMPBENCH_CLIP_MODEL = "openai/clip-vit-base-patch32"
# T2I-CompBench's weights, converted for transformers.
VQA_MODEL = "Salesforce/blip-vqa-base"
OCR_MODEL = "microsoft/trocr-base-printed"
