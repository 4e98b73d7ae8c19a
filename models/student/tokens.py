"""The tokenizer of a student that is not T5, whose token ids replace those of the cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.configuration_utils import PretrainedConfig

from secondcast.models.student.encoder_student_network import EncoderStudent, EncoderStudentConfig
from secondcast.storage_schemas.errors import StudentError, reason
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.manifest import Teacher

TOKENIZER_CONFIG = "tokenizer_config.json"


class StudentTokens:
    """A tokenizer that truncates and pads to `text_length`, and its `files` by name.

    pad_is_end: whether it pads with its end token. All methods are thread-safe.
    """

    def __init__(self, files: dict[str, bytes], text_length: int, *, where: str) -> None:
        self.files, self.text_length, self._where = files, text_length, where
        with TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            self._tokenizer = _load(folder, where, alone=True)
        self.pad_token_id = int(self._tokenizer.pad_token_id)
        self.pad_is_end = self._tokenizer.pad_token_id == self._tokenizer.eos_token_id
        # The tokenizers package stores length and padding in the tokenizer, and fails if two threads set them.
        self._lock = Lock()

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def ids(self, text: str) -> Array:
        """Token ids of a text, int64 [T]: truncated before the end token, padded on the right."""
        return self.batch([text])[0].numpy()

    def batch(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids of texts, int64 [B, T], as FluxPipeline computes them with this tokenizer as tokenizer_2."""
        with self._lock:
            rows = self._tokenizer(
                list(texts), padding="max_length", max_length=self.text_length, truncation=True, verbose=False
            ).input_ids
        return torch.from_numpy(np.array(rows, dtype=np.int64))


def own_tokens(source: str | Path, student: Any) -> StudentTokens | None:
    """The tokens of a student's own tokenizer; None for a student that reads the cache's token ids.

    source: the `source` of `new_student`, or the folder of a saved student.
    Raises StudentError for a tokenizer that cannot be read.
    """
    if not isinstance(student, EncoderStudent) or hasattr(student.config, "hidden_state_layers"):
        return None
    return read_tokens(str(source), text_length=int(student.config.text_length))


def text_length_remark(student: Any, teacher: Teacher) -> str | None:
    """A note about a student that reads fewer tokens than its teacher's text length; None for others."""
    own = int(student.config.text_length)
    if own >= teacher.text_length:
        return None
    return (
        f"the student has positions for {own} text tokens, but the cache's embeddings have {teacher.text_length}: "
        f"longer prompts are truncated; use the student with max_sequence_length={own}"
    )


def read_tokens(source: str, *, text_length: int) -> StudentTokens:
    """The tokenizer of a folder or hub name, as loaded by AutoTokenizer; StudentError if that fails."""
    files = [Path(source) / name for name in (TOKENIZER_CONFIG, "tokenizer.json")]
    there = not Path(source).is_dir() or any(file.is_file() for file in files)
    tokenizer = _load(source, source) if there else None
    # Without files AutoTokenizer creates one with an empty vocabulary.
    if tokenizer is None or not len(tokenizer):
        raise StudentError(
            f"{source} has no tokenizer, but a student that is not T5 needs its own: put tokenizer.json and "
            f"tokenizer_config.json next to its config.json"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise StudentError(
                f"the tokenizer of {source} has neither a pad token nor an end token to pad with: set pad_token in its "
                f"tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}
    saved[TOKENIZER_CONFIG] = _without_place(saved[TOKENIZER_CONFIG])
    return StudentTokens(saved, text_length, where=source)


def _without_place(data: bytes) -> bytes:
    """tokenizer_config.json without the keys that depend on where it was loaded from."""
    config = {key: value for key, value in json.loads(data).items() if key not in ("is_local", "local_files_only")}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def portable(config: bytes) -> bytes:
    """tokenizer_config.json for transformers 4 and 5: names that only version 5 understands are replaced."""
    settings: dict[str, Any] = json.loads(config)
    written = dict(settings)
    written.pop("backend", None)
    if isinstance(special := settings.get("extra_special_tokens"), list):
        del written["extra_special_tokens"]
        if special:
            written["additional_special_tokens"] = special
    if settings.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config if written == settings else (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()


def has_own_tokens(folder: Path) -> bool:
    """Whether a folder has a saved student with its own tokenizer."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or "hidden_state_layers" in found:
        return False
    return found.get("model_type") == EncoderStudentConfig.model_type


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a saved student with a tokenizer, its own or the teacher's."""
    return has_own_tokens(folder) or any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model"))


def _load(source: str, where: str, *, alone: bool = False) -> Any:
    local = Path(source).is_dir()
    # transformers does not know the model type of a saved student; its tokenizer files are sufficient.
    known = {"config": PretrainedConfig()} if alone or has_own_tokens(Path(source)) else {}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local, **known)
    # The tokenizers package raises bare Exception for an invalid file.
    except Exception as error:
        raise StudentError(
            f"the tokenizer of {where} cannot be read ({reason(error)}), but a student that is not T5 needs its own: "
            f"give a "
            f"folder or hub name that has one"
        ) from error
