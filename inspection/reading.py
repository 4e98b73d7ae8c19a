"""What the transformer reads in a prompt, and in how many directions: from a cache's sensitivity. No torch."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from storage_schemas import sensitivity
from storage_schemas.errors import DamagedCache
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import Sensitivity, predicted_weights

# From little to much: by the logarithm of the weight, each three times the one before.
SHADES = "·░▒▓█"
_LEAST, _STEP = 1 / 3, 3.0


def sensitivity_facts(cache: Cache) -> dict[str, Any] | None:
    """The record without its plan's prompts; None where none was measured.

    Of a damaged one `problem` alone: it hides nothing else of a cache. Of one that is not finished `parts` that are
    there, `of_parts`.
    """
    try:
        record = sensitivity.read_record(cache.folder)
        begun = sensitivity.unfinished(cache.folder) if record is None else None
    except DamagedCache as error:
        return {"problem": str(error)}
    if begun is not None:
        return {"parts": begun[0], "of_parts": begun[1]}
    if record is None:
        return None
    return {
        "prompts": len(record.plan.prompt_ids),
        "products": record.plan.products,
        "steps": len(record.plan.steps),
        "seconds": record.seconds,
        "effective_rank": record.effective_rank,
        "spectrum": list(record.spectrum),
        "predicted_correlation": record.predicted_correlation,
    }


def sensitivity_text(facts: dict[str, Any], width: int) -> str:
    """One entry of a screen. width: of the embedding."""
    if "problem" in facts:
        return str(facts["problem"])
    if "parts" in facts:
        return f"not finished, {facts['parts']} of {facts['of_parts']} parts: the same `understudy sensitivity` goes on"
    largest = ", ".join(f"{100 * share:.0f}" for share in facts["spectrum"][:6])
    told = facts["predicted_correlation"]
    predicted = (
        "; too few prompts to predict the token weights of others"
        if told is None
        else f"; token weights of other prompts predicted with correlation {told:.2f}"
    )
    return (
        f"measured on {facts['prompts']:,} prompts x {facts['products']} products x {facts['steps']} steps; "
        f"{facts['effective_rank']:.1f} of {width} directions matter (effective rank; largest {largest} %){predicted}"
    )


def reading_or_problem(cache: Cache, prompt: int, pieces: Sequence[str]) -> dict[str, Any] | None:
    """See reading; `problem` alone where what was measured cannot be read."""
    try:
        return reading(cache, sensitivity.read(cache.folder), prompt, pieces)
    except DamagedCache as error:
        return {"problem": str(error)}


def measured_on(cache: Cache) -> Sensitivity | None:
    """What was measured; None where nothing was, or where it cannot be read (`inspect verify` and summary say why)."""
    try:
        return sensitivity.read(cache.folder)
    except DamagedCache:
        return None


def reading(cache: Cache, measured: Sensitivity | None, prompt: int, pieces: Sequence[str]) -> dict[str, Any] | None:
    """Weights of a prompt's tokens, padding left out: mean 1 over all tokens of all prompts; None where unknown.

    sampled: whether they were measured on this prompt; else they are predicted from its embedding.
    """
    if measured is None:
        return None
    found = measured.weights_of(cache.prompts[prompt].id)
    sampled = found is not None
    if found is None:
        place = cache.layout.embedding_place(prompt)[0]
        if measured.predictor_D1 is None or ("embeddings", place) not in cache.records:
            return None
        found = predicted_weights(measured.predictor_D1, cache.embedding(prompt))
    return {"weights": [float(f"{value:.4g}") for value in found[: len(pieces)]], "sampled": sampled}


def shaded(pieces: Sequence[str], weights: Sequence[float]) -> str:
    """Each token behind a shade of its weight."""
    return " ".join(f"{shade(weight)}{piece}" for piece, weight in zip(pieces, weights, strict=True))


def shade(weight: float) -> str:
    """Of SHADES: the middle one for 1 to 3 times the mean."""
    level = 1 + np.floor(np.log(max(weight, 1e-9) / _LEAST) / np.log(_STEP))
    return SHADES[int(np.clip(level, 0, len(SHADES) - 1))]


def add_readings(cache: Cache, strips: Sequence[dict[str, Any]], indices: Sequence[int]) -> None:
    """Give each film strip of a report `reads`, [token, weight] of its prompt, where that is known and can be read.

    indices: number of the trajectory of each row of the table.
    """
    measured = measured_on(cache)
    if measured is None:
        return
    for strip in strips:
        try:
            prompt = cache.layout.place(indices[strip["row"]]).prompt
            pieces = token_pieces(cache, cache.prompts[prompt].token_ids)
            found = reading(cache, measured, prompt, pieces)
        except DamagedCache:
            # What is damaged stands among the report's problems.
            continue
        if found is not None:
            strip["reads"] = [list(pair) for pair in zip(pieces, found["weights"], strict=True)]


def token_pieces(cache: Cache, token_ids: Sequence[int]) -> list[str]:
    """Token ids as the texts of the cache's tokenizer."""
    file = cache.tokenizer_files.get("tokenizer.json")
    if file is None:
        return [str(token) for token in token_ids]
    tokenizer = _tokenizer(file)
    return [tokenizer.id_to_token(token) or str(token) for token in token_ids]


@lru_cache(maxsize=1)
def _tokenizer(file: bytes) -> Any:
    # Read once, not for each prompt of a report.
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(file)
