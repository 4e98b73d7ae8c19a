"""Weights by folder or hub name; downloads only the required files of a repository, at one commit."""

import json
from pathlib import Path

from secondcast.models.weights.files import TRANSFORMERS, CheckpointSource
from secondcast.storage_schemas.errors import reason


def local_weights(source: str, checkpoint: CheckpointSource, *, pickles: bool = False) -> Path:
    """The folder of a transformers checkpoint: a local folder, or a new or cached download from the hub.

    pickles: whether PyTorch's own format is downloaded if there is no other.

    Raises the error of `checkpoint` if none is available.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = [TRANSFORMERS.whole, TRANSFORMERS.index]
    not_reached: Exception | None = None
    try:
        folder = Path(hf_hub_download(source, "config.json")).parent
        for name in [*names, TRANSFORMERS.pickled, TRANSFORMERS.pickled_index] if pickles else names:
            try:
                file = Path(hf_hub_download(source, name, revision=folder.name))
            except LocalEntryNotFoundError as error:
                not_reached = error
                continue
            except EntryNotFoundError:
                continue
            if name.endswith(".index.json"):
                for part in sorted(set(json.loads(file.read_bytes())["weight_map"].values())):
                    hf_hub_download(source, part, revision=folder.name)
            break
        else:
            if not_reached is not None:
                raise not_reached
    except Exception as error:
        # Gated, misspelt, no network, an index of another form: the fix is the same.
        raise checkpoint.refused(
            f"it cannot be downloaded from the hub ({type(error).__name__}: {reason(error)})",
            f"run `hf download {source}` with a network connection, or give a folder",
        ) from error
    return folder
