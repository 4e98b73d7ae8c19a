"""Weights of scoring networks from a folder or the hub: safetensors only, identified by a revision."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from secondcast.models.teacher.hub import commit_of, split_revision
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.files import CheckpointSource
from secondcast.storage_schemas.errors import MissingWeightsError
from secondcast.storage_schemas.io.digests import digest, weight_sha256

# Files of networks and tokenizers: no pickles, no code, no subfolders for other programs.
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
_SUBFOLDERS = ("*/*",)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A folder in transformers' layout; `flag` is the option that names it, `source` its value.

    revision: the hub's commit; for a folder the sha256 of its weights, or a digest over several files.
    """

    path: Path
    source: str
    flag: str
    revision: str

    @classmethod
    def find(cls, source: str, *, flag: str, model_type: str) -> Self:
        """Find weights by folder, hub name or NAME@REVISION; MissingWeightsError if they are missing or invalid.

        model_type: as in config.json. Without a network connection, earlier downloads are used.
        """
        folder = Path(source)
        if folder.is_dir():
            path, revision = folder, _files_digest(folder)
        else:
            path = _download(source, flag)
            revision = commit_of(path) or split_revision(source)[1] or "unknown"
        _check(path, source, flag, model_type)
        return cls(path=path, source=source, flag=flag, revision=revision)

    def network(self, kind: Any, *, device: torch.device) -> Any:
        """Load the network in float32, in eval mode; MissingWeightsError unless the checkpoint has this class."""
        source = CheckpointSource(
            where=self.source, error=MissingWeightsError, again=f"download it again, or give another {self.flag}"
        )
        return load_checked(kind, self.path, source, dtype=torch.float32).to(device)

    def tokenizer(self) -> Any:
        """Load the tokenizer of the weights."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise self._unreadable("tokenizer", error) from error

    def image_processor(self) -> Any:
        """Load the image processor of the weights, with PIL's resampling whether torchvision is installed or not."""
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:
            raise self._unreadable("image processor", error) from error

    def _unreadable(self, what: str, error: Exception) -> MissingWeightsError:
        reason = " ".join(str(error).split())[:200]
        return MissingWeightsError(
            f"{self.source} cannot be read as {what} ({type(error).__name__}: {reason}): download it again, or give "
            f"another {self.flag}"
        )


class WantedWeights:
    """Weights that a metric needs, located on first use."""

    def __init__(self, source: str, *, flag: str, model_type: str) -> None:
        self.source, self._flag, self._model_type = source, flag, model_type

    @property
    def how(self) -> str:
        """How to obtain them, for Needs."""
        return f"`hf download {self.source}`, or {self._flag}"

    @cached_property
    def found(self) -> Weights:
        """See Weights.find."""
        return Weights.find(self.source, flag=self._flag, model_type=self._model_type)

    def absent(self) -> str | None:
        """Why they are unavailable, in one line with the fix; None if they are available. May download them."""
        try:
            _ = self.found
        except MissingWeightsError as error:
            return str(error)
        return None


def _check(path: Path, source: str, flag: str, model_type: str) -> None:
    try:
        found = json.loads((path / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise MissingWeightsError(
            f"{source} has no readable config.json: expected a transformers model; give another {flag}"
        ) from error
    if found != model_type:
        raise MissingWeightsError(f"{source} has model_type {found!r}, expected {model_type!r}: give another {flag}")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        raise MissingWeightsError(
            f"{source} has no *.safetensors" + (f", only {', '.join(pickles)}" if pickles else "") + ": pickled "
            f"weights can run code and are never read; if you trust them, load them, convert them to safetensors with "
            f"save_pretrained(FOLDER), and give {flag} FOLDER"
        )


def _files_digest(folder: Path) -> str:
    checksums = {file.name: weight_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return f"sha256:{next(iter(checksums.values()))}" if len(checksums) == 1 else f"digest:{digest(checksums)}"


def _download(source: str, flag: str) -> Path:
    name, revision = split_revision(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MissingWeightsError(
            f"no weights {source!r}: neither a folder nor a hub name such as openai/clip-vit-large-patch14; "
            f"give another {flag}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_SUBFOLDERS))
    except Exception as error:
        # Gated, misspelt, no network, nothing downloaded before: the fix is the same.
        raise MissingWeightsError(
            f"the weights {source} are not available and could not be downloaded ({type(error).__name__}): run `hf "
            f"download {name}` where there is a network, or give {flag} FOLDER"
        ) from error
