"""Checkpoints that are not what they should be: each damage a function of a folder, which says what has to be named."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path, str], list[str]]
"""Damages the checkpoint in a folder; layers: the key of its config.json that counts layers, with dots between parts.

What it returns has to stand in the error: the file, or the tensors where there are few.
"""


def weight_file(folder: Path) -> Path:
    """The one weight file of a folder."""
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(place: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of a file, or of a folder's one file."""
    file = place if place.is_file() else weight_file(place)
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def shard(folder: Path, count: int = 2) -> list[Path]:
    """Divide a folder's one file into several and an index."""
    file = weight_file(folder)
    tensors, files = load_file(file), []
    file.unlink()
    index: dict[str, str] = {}
    for number in range(count):
        part = folder / f"{file.stem}-{number + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[number::count]
        save_file({name: tensors[name] for name in names}, part, metadata={"format": "pt"})
        index |= dict.fromkeys(names, part.name)
        files.append(part)
    (folder / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


def _choice(tensors: Tensors, fits: Callable[[torch.Tensor], bool] = lambda _: True) -> str:
    # A tensor by chance, but the same one each time.
    names = sorted(name for name, tensor in tensors.items() if fits(tensor))
    return random.Random(len(names)).choice(names)


def _of_one(change: Callable[[torch.Tensor], torch.Tensor], fits: Callable[[torch.Tensor], bool]) -> Damage:
    def damage(folder: Path, layers: str) -> list[str]:
        name = _choice(load_file(weight_file(folder)), fits)
        rewrite(folder, lambda tensors: {**tensors, name: change(tensors[name])})
        return [name]

    return damage


def _drop(folder: Path, layers: str) -> list[str]:
    name = _choice(load_file(weight_file(folder)))
    rewrite(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    return [name]


def _rename(folder: Path, layers: str) -> list[str]:
    name = _choice(load_file(weight_file(folder)))
    rewrite(folder, lambda tensors: {f"{key}x" if key == name else key: tensor for key, tensor in tensors.items()})
    return [name, f"{name}x"]


def _prefix(prefix: str) -> Damage:
    def damage(folder: Path, layers: str) -> list[str]:
        rewrite(folder, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
        return [repr(prefix)]

    return damage


def _all_stored_as(dtype: torch.dtype, name: str) -> Damage:
    def damage(folder: Path, layers: str) -> list[str]:
        rewrite(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
        return [f"stored as {name}"]

    return damage


def _layers(by: int) -> Damage:
    def damage(folder: Path, layers: str) -> list[str]:
        file = folder / "config.json"
        config = json.loads(file.read_bytes())
        *parts, key = layers.split(".")
        inner = config
        for part in parts:
            inner = inner[part]
        inner[key] += by
        file.write_text(json.dumps(config))
        return ["missing" if by > 0 else "unexpected", "config.json has"]

    return damage


def _cut(bytes_left: Callable[[int], int]) -> Damage:
    def damage(folder: Path, layers: str) -> list[str]:
        file = weight_file(folder)
        data = file.read_bytes()
        file.write_bytes(data[: bytes_left(len(data))])
        return [file.name]

    return damage


def _lose_shard(folder: Path, layers: str) -> list[str]:
    lost = shard(folder)[1]
    lost.unlink()
    return [lost.name, "index.json"]


def _cut_shard(folder: Path, layers: str) -> list[str]:
    cut = shard(folder)[0]
    cut.write_bytes(cut.read_bytes()[:-1])
    return [cut.name]


def _is_oblong(tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.shape[0] != tensor.shape[1]


DAMAGES: dict[str, Damage] = {
    "dropped": _drop,
    "renamed": _rename,
    "prefixed": _prefix("model."),
    "prefixed as in ComfyUI": _prefix("text_encoders.t5xxl.transformer."),
    "transposed": _of_one(lambda tensor: tensor.transpose(0, 1), _is_oblong),
    "reshaped": _of_one(lambda tensor: tensor.reshape(1, -1), lambda tensor: tensor.ndim != 2),
    "flattened": _of_one(torch.flatten, lambda tensor: tensor.ndim >= 2),
    "one stored as integers": _of_one(lambda tensor: tensor.to(torch.int8), lambda tensor: tensor.ndim >= 2),
    "one stored as fp8": _of_one(lambda tensor: tensor.to(torch.float8_e4m3fn), lambda tensor: tensor.ndim >= 2),
    "all stored as integers": _all_stored_as(torch.int8, "I8"),
    "all stored as fp8": _all_stored_as(torch.float8_e4m3fn, "F8_E4M3"),
    "one layer more in the config": _layers(1),
    "one layer fewer in the config": _layers(-1),
    "cut in half": _cut(lambda size: size // 2),
    "cut by a byte": _cut(lambda size: size - 1),
    "cut in its header": _cut(lambda size: 40),
    "empty": _cut(lambda size: 0),
    "a shard missing": _lose_shard,
    "a shard cut": _cut_shard,
}


def every_tensor(folder: Path) -> Iterator[str]:
    """Names of the tensors of a folder's one file."""
    yield from sorted(load_file(weight_file(folder)))
