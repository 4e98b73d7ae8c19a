"""The weight files of a folder: which ones a library reads, whether they are complete, and their headers.

Reads no tensor data and, for safetensors, does not import torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from secondcast.storage_schemas.errors import SecondcastError, reason

READ_DTYPES = ("BF16", "F16", "F32", "F64")
"""Floating-point dtypes, as safetensors names them; they are cast to the compute dtype."""

_WHAT_IS_READ = f"safetensors of {', '.join(READ_DTYPES[:-1])} or {READ_DTYPES[-1]}"
# Weights in unsupported formats, whose presence indicates a checkpoint.
_OTHER_FORMS = ("*.gguf", "*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack")


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint, as named in errors.

    where: its folder, or the name that the user gave.
    error: class of the errors.
    again: how to get an intact one, such as "download it again".
    """

    where: str
    error: type[SecondcastError]
    again: str

    def refused(self, problem: str, fix: str | None = None) -> SecondcastError:
        """The error for a checkpoint that cannot be loaded; default fix: `again`."""
        return self.error(f"{self.where} cannot be loaded: {problem}; {fix or self.again}")


@dataclass(frozen=True, kw_only=True)
class FileNames:
    """The files from which a library reads weights.

    index_first: whether it prefers an index of several files over a single file if both exist.
    """

    whole: str
    pickled: str
    index_first: bool

    @property
    def index(self) -> str:
        """The index of a checkpoint in several files."""
        return f"{self.whole}.index.json"

    @property
    def pickled_index(self) -> str:
        """The index of a pickled checkpoint in several files."""
        return f"{self.pickled}.index.json"


TRANSFORMERS = FileNames(whole="model.safetensors", pickled="pytorch_model.bin", index_first=False)
DIFFUSERS = FileNames(
    whole="diffusion_pytorch_model.safetensors", pickled="diffusion_pytorch_model.bin", index_first=True
)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint; `dtype` as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The tensors of a checkpoint by name. pickled: whether they are in PyTorch's own format."""

    tensors: dict[str, StoredTensor]
    pickled: bool = False

    @property
    def dtypes(self) -> list[str]:
        """Distinct dtypes of the tensors, sorted."""
        return sorted({tensor.dtype for tensor in self.tensors.values()})


def stored_weights(folder: Path, names: FileNames, source: CheckpointSource, *, pickles: bool = False) -> StoredWeights:
    """The tensors that a library loads from a folder.

    pickles: whether PyTorch's own format is read as well, with the loader that runs no code.

    Raises source.error for a missing or quantized checkpoint, and for missing or incomplete files.
    """
    check_unquantized(folder, source)
    files = _safetensors_files(folder, names, source)
    if files:
        return StoredWeights(tensors={name: found for file in files for name, found in read_header(file, source)})
    if pickles and (files := _pickled_files(folder, names, source)):
        return StoredWeights(
            tensors={name: found for file in files for name, found in _pickled_header(file, source)}, pickled=True
        )
    raise source.refused(_no_weights(folder, names))


def tensor_files(folder: Path, names: FileNames, source: CheckpointSource) -> dict[str, Path]:
    """The safetensors file of each tensor that a library loads from a folder. Raises source.error."""
    files = _safetensors_files(folder, names, source)
    if not files:
        raise source.refused(_no_weights(folder, names))
    return {name: file for file in files for name, _ in read_header(file, source)}


def check_unquantized(folder: Path, source: CheckpointSource) -> None:
    """Raise source.error for a folder whose config.json states that its weights are quantized."""
    stated = _object(folder / "config.json").get("quantization_config")
    if stated:
        method = stated.get("quant_method", "unnamed") if isinstance(stated, dict) else stated
        raise source.refused(
            f"config.json has a quantization_config ({method}), expected {_WHAT_IS_READ}: quantized weights have a "
            f"packed layout, which is not supported",
            "give the unquantized checkpoint",
        )


def read_header(file: Path, source: CheckpointSource) -> Iterator[tuple[str, StoredTensor]]:
    """Names, shapes and dtypes of a safetensors file; source.error if it is missing or incomplete."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                part = tensors.get_slice(name)
                yield name, StoredTensor(shape=tuple(part.get_shape()), dtype=str(part.get_dtype()))
    except FileNotFoundError as error:
        raise source.refused(f"{file.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise source.refused(f"{file.name} is not a whole safetensors file ({reason(error)})") from error


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights in any format, or an index without its files."""
    patterns = (*_OTHER_FORMS, "*.index.json", "*.incomplete")
    return any(file.name != "training_args.bin" for pattern in patterns for file in folder.glob(pattern))


def _safetensors_files(folder: Path, names: FileNames, source: CheckpointSource) -> list[Path]:
    whole, index = folder / names.whole, folder / names.index
    if whole.is_file() and not (names.index_first and index.is_file()):
        return [whole]
    return _indexed_files(index, source) if index.is_file() else []


def _pickled_files(folder: Path, names: FileNames, source: CheckpointSource) -> list[Path]:
    whole, index = folder / names.pickled, folder / names.pickled_index
    if whole.is_file():
        return [whole]
    return _indexed_files(index, source) if index.is_file() else []


def _indexed_files(index: Path, source: CheckpointSource) -> list[Path]:
    named = _object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise source.refused(f"{index.name} is not the index of a checkpoint in several files")
    files = sorted(set(named.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise source.refused(f"{index.name} names {outside[0]!r}, expected files beside it")
    missing = [name for name in files if not (index.parent / name).is_file()]
    whole = index.name.removesuffix(".index.json")
    if missing and (index.parent / whole).is_file():
        raise source.refused(
            f"{missing[0]} is missing, which {index.name} names, but {whole} exists: the index is of another "
            f"checkpoint",
            f"delete {index.name}",
        )
    if missing:
        raise source.refused(
            f"{missing[0]} is missing, 1 of {len(missing)} of the {len(files)} files that {index.name} names: the "
            f"download is incomplete"
        )
    return [index.parent / name for name in files]


def _pickled_header(file: Path, source: CheckpointSource) -> Iterator[tuple[str, StoredTensor]]:
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        # Only PyTorch's newer format, a zip archive, can be memory-mapped without reading data.
        tensors: Any = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:
        # The unpickler may raise any error for invalid input.
        raise source.refused(f"{file.name} does not only contain tensors ({reason(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise source.refused(f"{file.name} does not only contain named tensors")
    for name, tensor in tensors.items():
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        yield name, StoredTensor(shape=tuple(tensor.shape), dtype=dtype)


def _no_weights(folder: Path, names: FileNames) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    others = sorted({file.name for pattern in _OTHER_FORMS for file in folder.glob(pattern)})
    found = f", only {', '.join(others[:3])}{' and others' if others[3:] else ''}" if others else ""
    return f"it has no {names.whole}{found}: expected {_WHAT_IS_READ}"


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no readable one."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
