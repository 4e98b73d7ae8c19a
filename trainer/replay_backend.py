"""By what the transformer computes in training: the backend of attention, and whether its blocks are compiled."""

from collections.abc import Iterator, Sequence

import torch

from models.attention import RECORDED_NATIVE, check_attention, recorded_attention
from models.compiling import check_compiler
from models.teacher_folder import TeacherFolder
from storage_schemas.reader import Cache
from storage_schemas.rewrite import ways_made
from trainer.mixture import Lesson
from trainer.settings import TrainSettings


def check_backend(settings: TrainSettings, teacher: TeacherFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Raise BadSettings, before weights are read, unless the attention backend and the compiler run here."""
    check_attention(settings.attention_backend, teacher.config("transformer"), dtype=dtype, device=device)
    if settings.compile:
        check_compiler(device)


def how_replayed(settings: TrainSettings) -> str:
    """As in "transformer with attention sdpa, compiled"."""
    compiled = ", compiled" if settings.compile else ""
    return f"transformer with attention {recorded_attention(settings.attention_backend)}{compiled}"


def remarks(settings: TrainSettings, lessons: Sequence[Lesson]) -> Iterator[str]:
    """What the caches were recorded by and this run does not compute by; and that compiling takes its time."""
    now = recorded_attention(settings.attention_backend)
    for lesson in lessons:
        was = _recorded(lesson.cache)
        if was - {now}:
            yield (
                f"{lesson.cache.folder} was recorded with attention {', '.join(sorted(was))}, this run has {now}: the "
                f"replay floor tells what the other rounding comes to"
            )
    if settings.compile:
        yield "the blocks of the transformer are compiled when a shape comes for the first time: about a minute each"


def _recorded(cache: Cache) -> set[str]:
    """The backends of the newest trajectories, which stand for all: a large cache is not read for this."""
    newest = max((shard for kind, shard in cache.records if kind == "trajectories"), default=None)
    if newest is None:
        return set()
    ways = ways_made(cache.records["trajectories", newest].provenance)
    return {str(way.get("attention", RECORDED_NATIVE)) for way in ways}
