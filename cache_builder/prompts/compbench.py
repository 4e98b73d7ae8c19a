"""Reads the training prompts of a T2I-CompBench folder, as the paper counts them.

The paper uses six categories with 4,200 lines; `complex_train_*` are parts of `complex_train` and would count twice.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from secondcast.cache_builder.prompts.files import PromptsRead, SourcedText, read_prompts
from secondcast.storage_schemas.errors import PromptsError

PAPER_CATEGORIES = ("color", "complex", "non_spatial", "shape", "spatial", "texture")
ALL_CATEGORIES = ("3d_spatial", "color", "complex", "non_spatial", "numeracy", "shape", "spatial", "texture")


def compbench_prompts(folder: Path, categories: Iterable[str]) -> PromptsRead:
    """Distinct prompts of `<category>_train.txt`, in the order of the names; PromptsError names missing files."""
    files = [folder / f"{category}_train.txt" for category in sorted(categories)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise PromptsError(
            f"{folder} has no {', '.join(missing)}: expected the folder with the prompts of T2I-CompBench "
            f"(examples/dataset/ of its repository)"
        )
    return read_prompts(files, limit=None)


def json_lines(texts: Iterable[SourcedText]) -> str:
    """Write JSONL with a line per prompt and source name, which a build reads with these names."""
    return "".join(
        json.dumps({"text": text.text, "source": name}, ensure_ascii=False) + "\n"
        for text in texts
        for name in text.sources
    )
