"""Text recognition in images: RapidOCR, TrOCR from transformers, and the program tesseract."""

import io
import math
import shutil
import subprocess
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from secondcast.evaluation.image_metrics.clip_score import clip_pixels
from secondcast.evaluation.image_metrics.metric import Needs, Picture
from secondcast.evaluation.image_metrics.weights import WantedWeights
from secondcast.evaluation.settings.networks import OcrName
from secondcast.storage_schemas.errors import MissingExtraError

_MOST_NEW_TOKENS = 64
# Pixels of the height of a line for RapidOCR, whose network scales it to 48.
_LEAST_LINE = 64
# Sparse text anywhere in the image, in no page order.
_SPARSE_TEXT = "11"


class Recogniser(Protocol):
    """Reads the text in images."""

    name: OcrName
    needs: Needs

    def absent(self) -> str | None:
        """Why it cannot run here, in one line with the fix; None if it can."""
        ...

    def read(self, pictures: Sequence[Picture]) -> list[str]:
        """The text of each image, empty if none was found."""
        ...

    @property
    def model(self) -> str:
        """Name of the network or the program."""
        ...

    @property
    def revision(self) -> str:
        """Commit, digest of weights, or version."""
        ...


class RapidOcr:
    """RapidOCR with the PP-OCR networks of its wheel (Apache-2.0) on the CPU: finds text anywhere, turned text too."""

    name: OcrName = "rapidocr"
    model = "rapidocr"

    def __init__(self) -> None:
        how = "pip install 'secondcast[ocr]'"
        self.needs = Needs(packages=("rapidocr", "onnxruntime"), weights="in the package", how=how)

    @property
    def revision(self) -> str:
        """See Recogniser."""
        return f"{version('rapidocr')}, onnxruntime {version('onnxruntime')}"

    def absent(self) -> str | None:
        """See Recogniser."""
        if missing := [name for name in self.needs.packages if find_spec(name) is None]:
            return (
                f"--ocr rapidocr needs {missing[0]}, which is not installed: {self.needs.how}, or give --ocr tesseract "
                f"or trocr"
            )
        return None

    def read(self, pictures: Sequence[Picture]) -> list[str]:
        """See Recogniser. Lines in the order in which they are found, from top to bottom."""
        return [self._reading(picture.pixels()) for picture in pictures]

    def _reading(self, image: Image.Image) -> str:
        found = self._engine(_bgr(image), use_det=True, use_cls=False, use_rec=False)
        lines = list[str]()
        for box_42 in () if found.boxes is None else found.boxes:
            read = self._engine(_bgr(_line(image, box_42)), use_det=False, use_cls=False, use_rec=True)
            lines += read.txts or ()
        return " ".join(lines)

    @cached_property
    def _engine(self) -> Any:
        from rapidocr import RapidOCR

        # It would log every picture without text.
        return RapidOCR(params={"Global.log_level": "critical"})


def _bgr(image: Image.Image) -> np.ndarray:
    """Pixels as OpenCV has them: blue, green, red."""
    return np.asarray(image)[:, :, ::-1]


def _line(image: Image.Image, box_42: np.ndarray) -> Image.Image:
    """The part of an image within the corners of a line, clockwise from the left upper one; small ones enlarged.

    The library's own part has the size of the line, and letters of 20 pixels were lost: docs/evaluation.md.
    """
    left_top, right_top, right_bottom, left_bottom = box_42.tolist()
    wide = max(math.dist(left_top, right_top), math.dist(left_bottom, right_bottom))
    high = max(math.dist(left_top, left_bottom), math.dist(right_top, right_bottom))
    larger = max(1.0, _LEAST_LINE / high)
    size = (max(1, round(wide * larger)), max(1, round(high * larger)))
    corners = (*left_top, *left_bottom, *right_bottom, *right_top)
    line = image.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    # Upright text, as the library turns it.
    return line.rotate(90, expand=True) if high >= 1.5 * wide else line


class TrOcr:
    """TrOCR (Li et al. 2021, arXiv 2109.10282), greedy. It reads one line of text: the whole image."""

    name: OcrName = "trocr"

    def __init__(self, model: str, *, device: torch.device) -> None:
        self._wanted = WantedWeights(model, flag="--ocr-model", model_type="vision-encoder-decoder")
        self.model, self._device = model, device
        self.needs = Needs(packages=("transformers",), weights=model, how=self._wanted.how)

    @property
    def revision(self) -> str:
        """See Recogniser."""
        return self._wanted.found.revision

    def absent(self) -> str | None:
        """See Recogniser."""
        return self._wanted.absent()

    def read(self, pictures: Sequence[Picture]) -> list[str]:
        """See Recogniser."""
        network, tokenizer, processor = self._parts
        pixels_BCHW = clip_pixels(processor, [picture.pixels() for picture in pictures], self._device)
        with torch.inference_mode():
            ids_BT = network.generate(pixels_BCHW, max_new_tokens=_MOST_NEW_TOKENS, num_beams=1, do_sample=False)
        return list(tokenizer.batch_decode(ids_BT, skip_special_tokens=True))

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        from transformers import VisionEncoderDecoderModel

        weights = self._wanted.found
        network = weights.network(VisionEncoderDecoderModel, device=self._device)
        return network, weights.tokenizer(), weights.image_processor()


class Tesseract:
    """The program `tesseract` with its English data, set to find text anywhere in an image (--psm 11)."""

    name: OcrName = "tesseract"
    model = "tesseract"

    def __init__(self) -> None:
        self.needs = Needs(
            packages=("tesseract",), weights="its data for English", how="install tesseract-ocr with its English data"
        )

    @cached_property
    def revision(self) -> str:
        """See Recogniser."""
        message = self._run("--version").split()
        return message[1] if len(message) > 1 else "unknown"

    def absent(self) -> str | None:
        """See Recogniser."""
        if shutil.which("tesseract") is None:
            return (
                "--ocr tesseract needs the program tesseract on the PATH: install tesseract-ocr, or give --ocr rapidocr"
            )
        return None

    def read(self, pictures: Sequence[Picture]) -> list[str]:
        """See Recogniser."""
        texts = []
        for picture in pictures:
            # The same pixels as for the other metrics; a broken image is reported as such.
            png = io.BytesIO()
            picture.pixels().save(png, "png")
            texts.append(self._run("stdin", "stdout", "-l", "eng", "--psm", _SPARSE_TEXT, given=png.getvalue()))
        return texts

    def _run(self, *words: str, given: bytes = b"") -> str:
        done = subprocess.run(["tesseract", *words], input=given, capture_output=True, check=False)
        if done.returncode:
            message = " ".join(done.stderr.decode(errors="replace").split())[:200]
            raise MissingExtraError(
                f"tesseract ended with code {done.returncode} ({message}): install tesseract-ocr with its English "
                f"data, or give --ocr rapidocr"
            )
        return done.stdout.decode(errors="replace")
