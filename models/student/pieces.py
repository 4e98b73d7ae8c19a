"""Whether a student's tokenizer has the pieces of the tokenizer whose token ids the student reads."""

import json
from collections.abc import Mapping
from pathlib import Path

from secondcast.storage_schemas.errors import StudentError, reason

# Each of them has all pieces; a folder has one or several.
_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def check_same_pieces(source: str, teacher: Mapping[str, bytes], *, fix: str) -> None:
    """Raise StudentError if a token id is one piece to a student and another one to its teacher.

    source: folder or hub name of the student; without a tokenizer in it nothing is compared.
    teacher: the files of the teacher's tokenizer by name, as a cache has them.
    fix: what to do about it.

    Token ids that only one of them has are not compared, and neither are added tokens.
    """
    found = _files_of(source)
    if any(found.get(name) == teacher.get(name) is not None for name in _FILES):
        return
    own, others = _pieces(found, source), _pieces(teacher, "the teacher")
    other = next((number for number in sorted(own.keys() & others.keys()) if own[number] != others[number]), None)
    if other is not None:
        raise StudentError(
            f"the tokenizer of {source} has the piece {own[other]!r} as token id {other}, expected {others[other]!r}, "
            f"that of the teacher, whose token ids the student reads: {fix}"
        )


def _files_of(source: str) -> dict[str, bytes]:
    folder = Path(source)
    if folder.is_dir():
        return {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    found = {}
    for name in _FILES:
        # Also of a file that was never downloaded, without a network connection.
        try:
            found[name] = Path(hf_hub_download(source, name)).read_bytes()
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise StudentError(
                f"{name} of {source} cannot be downloaded from the hub ({type(error).__name__}: {reason(error)}): run "
                f"`hf download {source}` with a network connection, or give a folder"
            ) from error
    return found


def _pieces(files: Mapping[str, bytes], where: str) -> dict[int, str]:
    """Pieces by token id; empty without a file that has them."""
    name = next((name for name in _FILES if name in files), None)
    if name is None:
        return {}
    try:
        if name == "tokenizer.json":
            from tokenizers import Tokenizer

            vocabulary = Tokenizer.from_buffer(files[name]).get_vocab(with_added_tokens=False)
            return {number: piece for piece, number in vocabulary.items()}
        if name == "vocab.json":
            return {int(number): str(piece) for piece, number in json.loads(files[name]).items()}
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=files[name])
        return {number: str(model.IdToPiece(number)) for number in range(model.GetPieceSize())}
    # The tokenizers package raises bare Exception for an invalid file.
    except Exception as error:
        raise StudentError(
            f"{name} of {where} cannot be read ({reason(error)}), expected the tokenizer of a text encoder: download "
            f"it again"
        ) from error
