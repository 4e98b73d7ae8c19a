"""Load a part of a network: the weights of its other modules are not read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from secondcast.models.weights.checked_loading import check_weights, read_tensor
from secondcast.models.weights.files import DIFFUSERS, CheckpointSource, FileNames, tensor_files


def load_part(
    kind: Any,
    folder: Path,
    source: CheckpointSource,
    *,
    dtype: torch.dtype,
    config: Mapping[str, Any],
    without: Sequence[str],
) -> Any:
    """A part of a network of a class of diffusers, cast to `dtype`, on the host.

    config: values in place of those of the folder, with which the class has a part of the tensors.
    without: modules that are removed from it.

    Raises source.error, before any data is read, unless the folder has exactly the tensors of the whole network.
    """
    check_weights(kind, folder, source)
    whole = {**kind.load_config(folder), **config}
    with torch.device("meta"):
        network = kind.from_config(whole)
    if {name for name, _ in network.named_buffers()} - network.state_dict().keys():
        # Buffers that are in no file, such as positions, are computed.
        with init_empty_weights(include_buffers=False):
            network = kind.from_config(whole)
    for name in without:
        owner, _, attribute = name.rpartition(".")
        delattr(network.get_submodule(owner), attribute)
    fill(network, folder, DIFFUSERS, source, dtype=dtype)
    return network


def fill(
    network: torch.nn.Module,
    folder: Path,
    names: FileNames,
    source: CheckpointSource,
    *,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    """Read the weights of a network without data, which has a part of the tensors in a folder, cast to `dtype`.

    prefix: of the names of its tensors in the files.
    """
    files = tensor_files(folder, names, source)
    wanted = {name: f"{prefix}{name}" for name in network.state_dict()}
    tensors = {name: read_tensor(files[stored], stored, source).to(dtype) for name, stored in wanted.items()}
    network.load_state_dict(tensors, assign=True)
