"""Embeddings that other workers, or an earlier text stage, have to make before sampling begins."""

import time
from collections.abc import Sequence

from secondcast.cache_builder.worker import Worker
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.schema.commits import committed_shards, record_path
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter

POLL_SECONDS = 1.0
# A listing of a large cache on an object store is dozens of requests; between two, the first absent shard is asked for.
LISTING_SECONDS = 60.0


def needed_embeddings(writer: CacheWriter, shards: Sequence[ShardRange]) -> list[ShardRange]:
    """The embedding shards with the prompts of some trajectory shards, in order."""
    numbers = {number for shard in shards for number in writer.layout.embedding_shards_of(shard)}
    return [writer.layout.embeddings[number] for number in sorted(numbers)]


def wait_for_embeddings(
    writer: CacheWriter, needed: Sequence[ShardRange], worker: Worker, *, wait_seconds: float, progress: Progress
) -> None:
    """Return when all `needed` embedding shards are committed; NotInCacheError after so long without a new one."""
    absent = _absent(writer, needed)
    if absent and wait_seconds > 0:
        progress.say(f"waiting for {counted(len(absent), 'embedding shard')} made elsewhere")
    since = listed = time.monotonic()
    while absent:
        time.sleep(min(POLL_SECONDS, wait_seconds))
        now = time.monotonic()
        over = now - since >= wait_seconds
        if not over and now - listed < LISTING_SECONDS and not _is_there(writer, absent[0]):
            continue
        listed, left = now, _absent(writer, needed)
        if len(left) < len(absent):
            since = now
        elif over:
            raise NotInCacheError(_message(writer, needed, absent, worker, wait_seconds))
        absent = left


def _is_there(writer: CacheWriter, shard: ShardRange) -> bool:
    return writer.folder.size(record_path("embeddings", shard.shard)) is not None


def _absent(writer: CacheWriter, needed: Sequence[ShardRange]) -> list[ShardRange]:
    there = committed_shards(writer.folder, "embeddings")
    return [shard for shard in needed if shard.shard not in there]


def _message(
    writer: CacheWriter, needed: Sequence[ShardRange], absent: list[ShardRange], worker: Worker, wait_seconds: float
) -> str:
    what = f"{writer.folder} lacks {len(absent)} of the {len(needed)} embedding shards that this stage samples from"
    if worker.count == 1:
        waited = f" after {wait_seconds:.0f} seconds without a new one" if wait_seconds else ""
        return (
            f"{what}{waited}: give the command with --stage text first (or --stage all), or --embeddings-timeout "
            f"SECONDS where "
            f"another machine is making them"
        )
    makers = sorted({shard.shard % worker.count for shard in absent})
    return (
        f"{what} after {wait_seconds:.0f} seconds without a new one: they are made by --worker "
        f"{', '.join(f'{number}/{worker.count}' for number in makers[:8])}; start what is not running, or give the "
        f"command with --stage text once, then this one again"
    )
