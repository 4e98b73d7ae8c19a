"""Reads the prompts of a T2I-CompBench folder, for training as the paper counts them, or for evaluation.

The paper uses six categories with 4,200 lines; `complex_train_*` are parts of `complex_train` and would count twice.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secondcast.cache_builder.prompts.files import PromptsRead, SourcedText, read_prompts
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.schema.prompts import prompt_id

PAPER_CATEGORIES = ("color", "complex", "non_spatial", "shape", "spatial", "texture")
ALL_CATEGORIES = ("3d_spatial", "color", "complex", "non_spatial", "numeracy", "shape", "spatial", "texture")
# The files that say which relations a complex prompt has, in the order in which the benchmark's 3-in-1 looks there.
_COMPLEX_KINDS = ("complex_spatial", "complex_action", "complex_spatialaction")


def compbench_prompts(folder: Path, categories: Iterable[str]) -> PromptsRead:
    """Distinct prompts of `<category>_train.txt`, in the order of the names; PromptsError names missing files."""
    return read_prompts(
        [_file(folder, category, "train") for category in _all_there(folder, categories, "train")], limit=None
    )


def compbench_validation(folder: Path, categories: Iterable[str]) -> PromptsRead:
    """Distinct prompts of `<category>_val.txt` with their category, in the order of the names and of each file.

    Complex prompts also have their kind as source (complex_spatial, complex_action or complex_spatialaction), where
    the folder has the files of the kinds. PromptsError names missing files.
    """
    read = read_prompts(
        [
            PromptSource(path=str(_file(folder, category, "val")), name=category)
            for category in _all_there(folder, categories, "val")
        ],
        limit=None,
    )
    kinds = _complex_kinds(folder)
    texts = []
    for text in read.texts:
        kind = kinds.get(prompt_id(text.text)) if "complex" in text.sources else None
        texts.append(text if kind is None else replace(text, sources=(*text.sources, kind)))
    return replace(read, texts=tuple(texts))


def _all_there(folder: Path, categories: Iterable[str], split: str) -> list[str]:
    ordered = sorted(categories)
    files = [_file(folder, category, split) for category in ordered]
    if missing := [file.name for file in files if not file.is_file()]:
        raise PromptsError(
            f"{folder} has no {', '.join(missing)}: expected the folder with the prompts of T2I-CompBench "
            f"(examples/dataset/ of its repository)"
        )
    return ordered


def _file(folder: Path, category: str, split: str) -> Path:
    return folder / f"{category}_{split}.txt"


def _complex_kinds(folder: Path) -> dict[str, str]:
    """Kind by prompt id."""
    kinds: dict[str, str] = {}
    for kind in _COMPLEX_KINDS:
        if (file := folder / f"complex_val_{kind.removeprefix('complex_')}.txt").is_file():
            for text in read_prompts([file], limit=None).texts:
                kinds.setdefault(prompt_id(text.text), kind)
    return kinds


def json_lines(
    texts: Iterable[SourcedText],
    columns: Callable[[SourcedText], Mapping[str, Any]] = lambda _: {},
    *,
    line_per_source: bool = True,
) -> str:
    """Write JSONL, which a build reads with its source names.

    columns: further keys of a text's lines.
    line_per_source: a line per prompt and source name, otherwise a line per prompt with the name, or all of them.
    """
    lines = []
    for text in texts:
        names: list[Any] = [*text.sources]
        if not line_per_source and len(names) > 1:
            names = [names]
        lines += [
            json.dumps({"text": text.text, "source": name, **columns(text)}, ensure_ascii=False) for name in names
        ]
    return "".join(f"{line}\n" for line in lines)
