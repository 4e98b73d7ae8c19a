"""What a table states of its text encoders: sizes, and embeddings of the same captions for the t-SNE map."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from secondcast.evaluation.tables.encoder_rows import EncoderRow, student_row, teacher_row
from secondcast.evaluation.tables.paper.making import FAILURES, Making
from secondcast.evaluation.tables.paper.recipe import TableRow, is_baseline
from secondcast.evaluation.tables.scored_rows import computed_by
from secondcast.evaluation.text_encoder import open_text_encoder
from secondcast.models.memory.peak import release_memory
from secondcast.models.schedule import DTYPES
from secondcast.storage_schemas.errors import reason
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.fields import Array

_ENCODERS, _KEY = "encoders", "embedding_ND"
# The map of more would take minutes, and its points hide each other.
_MOST_CAPTIONS = 192


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Sizes of a text encoder, and the mean over tokens of its embeddings of N captions."""

    parameters: int
    weight_bytes: int
    embedding_ND: Array


def encoder_facts(making: Making) -> dict[str, EncoderFacts]:
    """Facts of each row whose text encoder can be loaded; kept in the output folder, one for each text encoder."""
    captions = [text for prompts in making.prompts.values() for text in prompts.prompts][:_MOST_CAPTIONS]
    found: dict[str, EncoderFacts] = {}
    for name, row in making.recipe.rows.items():
        try:
            found[name] = _facts(making, row, captions)
        except FAILURES as error:
            making.progress.say(f"{name}: its text encoder has no figures: {reason(error)}")
    return found


def _facts(making: Making, row: TableRow, captions: list[str]) -> EncoderFacts:
    opened = open_text_encoder(
        row.student, making.teacher(row), text_length=row.text_length, dtype=DTYPES[row.dtype],
        device=torch.device("cpu"), quantize=row.quantize_text_encoder,
    )  # fmt: skip
    asked = {"encoder": opened.digest, "dtype": row.dtype, "text_length": str(opened.text_length)}
    key = digest({**asked, "captions": digest(captions), **computed_by(str(making.device))})
    file = making.folder / _ENCODERS / f"{key[:24]}.safetensors"
    if (kept := _kept(file)) is not None:
        return kept
    encoder = _row(making, row)
    facts = EncoderFacts(
        parameters=encoder.parameters,
        weight_bytes=encoder.weight_bytes,
        embedding_ND=encoder.embeddings(captions, making.device),
    )
    del encoder
    release_memory(making.device)
    sizes = {"parameters": str(facts.parameters), "weight_bytes": str(facts.weight_bytes)}
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(file, save({_KEY: facts.embedding_ND}, sizes))
    return facts


def _row(making: Making, row: TableRow) -> EncoderRow:
    teacher = making.teacher(row)
    if is_baseline(row):
        return teacher_row(
            teacher, quantize=row.quantize_text_encoder, text_length=row.text_length, dtype=DTYPES[row.dtype],
            device=making.device,
        )  # fmt: skip
    return student_row(row.student, Path(row.student), teacher, device=making.device)


def _kept(file: Path) -> EncoderFacts | None:
    try:
        with safe_open(file, framework="numpy") as tensors:
            sizes = tensors.metadata()
            return EncoderFacts(
                parameters=int(sizes["parameters"]),
                weight_bytes=int(sizes["weight_bytes"]),
                embedding_ND=tensors.get_tensor(_KEY),
            )
    except (FileNotFoundError, SafetensorError):
        return None
