"""Caches with held-out prompts of two sources, and untrained students that fit them."""

from pathlib import Path
from typing import Any

import torch

from secondcast.cache_builder.build import build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.models.student.student import new_student, save_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import REPLAY_PARTS, TeacherFolder, build_parts, find_teacher
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import is_held_out, prompt_id

CPU = torch.device("cpu")
ROWS = 4
STEPS = 3
PARTS = (*REPLAY_PARTS, "vae")
_TEXTS = [f"a red {word} {number}" for word in ("dog", "cat") for number in range(400)]
HELD_OUT = [text for text in _TEXTS if is_held_out(prompt_id(text))][:8]
TRAINED = [text for text in _TEXTS if not is_held_out(prompt_id(text))]


def build_recorded(
    cache: Path | str,
    teacher: Path | str,
    *,
    prompts: Path | None = None,
    trained: int = 4,
    held_out: int = 8,
    **flags: Any,
) -> Any:
    """Held-out prompts, half of source `few` and half of `many`; then trained ones. Batches of ROWS, all full.

    prompts: a folder for their files, default beside the cache.
    """
    folder = Path(cache).parent if prompts is None else prompts
    folder.mkdir(parents=True, exist_ok=True)
    few, many = folder / "few.txt", folder / "many.txt"
    half, texts = held_out // 2, HELD_OUT[:held_out]
    few.write_text("".join(f"{text}\n" for text in [*texts[:half], *TRAINED[:trained]]))
    many.write_text("".join(f"{text}\n" for text in texts[half:]) or f"{TRAINED[0]}\n")
    usual = {"steps": STEPS, "shard_size": ROWS, "batch_size": ROWS, "dtype": "float32", "guidance": (2.0, 3.5)}
    settings = BuildSettings.from_flags(prompts=(few, many), **usual | flags)
    build(cache, settings, find_teacher(str(teacher), build_parts(settings.pooled)), CPU, Silent(), None)
    return cache


def make_student(folder: Path, source: Path, cache: Path) -> Path:
    """A saved student of random weights that fits a cache."""
    student = new_student(str(source), Cache.open(cache).manifest.teacher, init="auto", dropout=0.0, seed=0)
    tokens = own_tokens(str(source), student)
    save_student(student, folder, tokenizer=None if tokens is None else tokens.files)
    return folder


def replayed(teacher: Path) -> TeacherFolder:
    """The teacher, of which a replay reads the transformer and the VAE."""
    return find_teacher(str(teacher), PARTS)
