"""The tokens of a prompt as text. Does not import torch."""

from collections.abc import Sequence

from secondcast.storage_schemas.reader import Cache


def token_pieces(cache: Cache, token_ids: Sequence[int]) -> list[str]:
    """Decode token ids one by one with the cache's tokenizer."""
    from tokenizers import Tokenizer

    file = cache.tokenizer_files.get("tokenizer.json")
    if file is None:
        return [str(token) for token in token_ids]
    tokenizer = Tokenizer.from_buffer(file)
    return [tokenizer.id_to_token(token) or str(token) for token in token_ids]
