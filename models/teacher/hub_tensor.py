"""One tensor of a safetensors file on the hub, without the rest of the file."""

import json
from dataclasses import dataclass
from typing import BinaryIO, cast

import torch
from safetensors.torch import load

# A safetensors file: length of the header (little endian), header (JSON), data.
_LENGTH_BYTES = 8
# The limit of safetensors itself.
_LARGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a hub repository at a commit. sha256: of the whole file, None where the hub does not state it."""

    name: str
    path: str
    commit: str
    size_bytes: int
    sha256: str | None

    @classmethod
    def find(cls, name: str, path: str, commit: str) -> "HubFile":
        """Metadata of a file on the hub, without reading it. FileNotFoundError, or errors of huggingface_hub."""
        from huggingface_hub import HfApi

        found = HfApi().get_paths_info(name, path, revision=commit)
        if not found or not hasattr(found[0], "size"):
            raise FileNotFoundError(path)
        (file,) = found
        # Small files of a repository are plain git objects, for which the hub has no sha256.
        sha256 = file.lfs.sha256 if file.lfs is not None else None
        return cls(name=name, path=path, commit=commit, size_bytes=file.size, sha256=sha256)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, in the file's dtype, in three range reads. Errors: see read_tensor, or of huggingface_hub."""
        from huggingface_hub import HfFileSystem

        location = f"{self.name}@{self.commit}/{self.path}"
        # A given size avoids another lookup; without a cache only the requested bytes are read.
        with HfFileSystem().open(location, "rb", size=self.size_bytes, cache_type="none") as file:
            return read_tensor(cast(BinaryIO, file), self.size_bytes, key)


def read_tensor(file: BinaryIO, size_bytes: int, key: str) -> torch.Tensor:
    """One tensor of a safetensors file of `size_bytes`; only reads its header and that tensor's bytes.

    ValueError, KeyError, TypeError or SafetensorError if it is not such a file, or has no such tensor.
    """
    length = int.from_bytes(_read(file, 0, _LENGTH_BYTES), "little")
    data_at = _LENGTH_BYTES + length
    if length > _LARGEST_HEADER_BYTES or data_at > size_bytes:
        raise ValueError(f"a header of {length} bytes in a file of {size_bytes}")
    entry = json.loads(_read(file, _LENGTH_BYTES, length))[key]
    first, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= first <= end <= size_bytes - data_at:
        raise ValueError(f"{key} at {first} to {end} of {size_bytes - data_at} bytes")
    data = _read(file, data_at + first, end - first)
    # As a file of this tensor alone, so that the library checks shape and dtype against the bytes.
    header = json.dumps({key: {**entry, "data_offsets": [0, len(data)]}}).encode()
    return load(len(header).to_bytes(_LENGTH_BYTES, "little") + header + data)[key]


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count) if count else b""
    if len(data) != count:
        # A server without range requests sends the file from its start.
        raise ValueError(f"{len(data)} bytes for the {count} at {at}")
    return data
