"""The text stage: token ids and embeddings, once per prompt; then the text encoder is released."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from secondcast.cache_builder.pipeline.background_writer import BackgroundWriter
from secondcast.cache_builder.prompts.files import SourcedText
from secondcast.cache_builder.provenance import provenance
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.schema.fields import Arrays
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import NEGATIVE_TEXT, Teacher
from secondcast.storage_schemas.schema.prompts import Prompt, prompt_id
from secondcast.storage_schemas.tensors import from_torch
from secondcast.storage_schemas.writer import CacheWriter


def tokenised_prompts(
    texts: Sequence[SourcedText], teacher: TeacherFolder, *, text_length: int | None = None
) -> tuple[list[Prompt], list[str]]:
    """Prompts with the token ids of the teacher's tokenizer, and the texts that had to be cut.

    text_length: None for the teacher's own.
    """
    tokenizer = teacher.family.tokenizer(teacher.part("large_tokenizer"))
    all_ids = tokenizer.token_ids([source.text for source in texts])
    length = teacher.checked_text_length(text_length)
    prompts = [
        Prompt(
            id=prompt_id(source.text),
            text=source.text,
            sources=source.sources,
            token_ids=tokenizer.cut(ids, length),
        )
        for source, ids in zip(texts, all_ids, strict=True)
    ]
    return prompts, [source.text for source, ids in zip(texts, all_ids, strict=True) if len(ids) > length]


def negative_prompt(teacher: TeacherFolder, *, text_length: int | None = None) -> Prompt:
    """The prompt whose prediction guidance moves away from; its source states what it is."""
    prompts, _ = tokenised_prompts(
        [SourcedText(text=NEGATIVE_TEXT, sources=("negative",))], teacher, text_length=text_length
    )
    return prompts[0]


def run_text_stage(
    writer: CacheWriter,
    encoder: TeacherTextEncoder,
    shards: Sequence[ShardRange],
    *,
    done: int,
    share: int,
    batch_size: int,
    progress: Progress,
) -> None:
    """Encode the prompts of these embedding shards and commit them.

    share, done: prompts of this worker, and how many of them are committed.
    """
    with (
        BackgroundWriter(writer) as background,
        progress.bar("text", total=share, done=done, unit="prompts") as bar,
    ):
        for shard in shards:
            started = time.monotonic()
            background.commit(
                "embeddings",
                shard,
                encode_shard(writer, encoder, shard, batch_size),
                seconds=time.monotonic() - started,
                provenance=provenance(device=encoder.device, batch_size=batch_size, networks=encoder.networks),
            )
            bar.advance(shard.rows)


def encode_shard(writer: CacheWriter, encoder: TeacherTextEncoder, shard: ShardRange, batch_size: int) -> Arrays:
    """The arrays of one shard."""
    prompts = writer.prompts[shard.first : shard.first + shard.rows]
    return encode_prompts(encoder, writer.manifest.teacher, prompts, batch_size)


def encode_prompts(encoder: TeacherTextEncoder, teacher: Teacher, prompts: Sequence[Prompt], batch_size: int) -> Arrays:
    """Embeddings [rows, T, D] of prompts in batches, and their conditioning if the encoder has CLIP."""
    ids_NT = torch.full((len(prompts), teacher.text_length), teacher.pad_token_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_NT[row, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
    parts = [from_torch(encoder.encode(ids_BT)) for ids_BT in ids_NT.split(batch_size)]
    arrays = {"encoder_hidden_states": np.concatenate(parts)}
    if encoder.conditioning is not None:
        texts = [prompt.text for prompt in prompts]
        batches = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
        found = [encoder.conditioning.encode(batch) for batch in batches]
        arrays |= {name: np.concatenate([from_torch(part[name]) for part in found]) for name in found[0]}
    return arrays
