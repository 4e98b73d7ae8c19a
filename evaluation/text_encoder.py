"""The text encoder to sample with: a student, or the teacher's own large one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from secondcast.evaluation.sampling import Embed, OwnTokensEmbed
from secondcast.evaluation.settings.generating import TEACHER
from secondcast.models.families.encoders.interface import text_mask
from secondcast.models.families.family import TEXT_MASK, Family, Role
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.options import TextQuantization
from secondcast.models.memory.quantized import check_quantizer, quantize_text_encoder
from secondcast.models.student.folder import INITIAL_FILE, config_of, student_folder, weight_bytes
from secondcast.models.student.student import Student, check_fits, load_student, untrained_like
from secondcast.models.student.tokens import StudentTokens, has_tokenizer, own_tokens
from secondcast.models.teacher.folder import POOLED_PARTS, TeacherFolder
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.errors import SettingsError, StudentError
from secondcast.storage_schemas.io.digests import digest, weight_sha256
from secondcast.storage_schemas.schema.recording import Pooled

PICTURE_PARTS: tuple[Role, ...] = ("transformer", "scheduler", "vae")
# The files of a tokenizer depend on its kind: every file name that only tokenizers use.
_TOKENIZER_ENDINGS = (".json", ".model", ".txt", ".jinja")
_NO_TOKENIZER = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "secondcast.json"),
    INITIAL_FILE,
)
_WRITTEN_BY = ("transformers_version", "_name_or_path")


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder with its text length; `digest` covers its weights and their form, of a student all its files.

    token_ids: texts -> token_ids_BT, truncated and padded to the text length.
    weights_digest: digest of its weights alone, as recorded by earlier versions.
    parameters: number of a student's parameters; None for the teacher, which is loaded on first use.
    weight_bytes: bytes of a student's weight files; None for the teacher.
    trained_guidance: lowest and highest guidance scale of its training, None if unknown.
    row_bytes: size of the embedding of one text.
    text_mask: token_ids_BT -> encoder_attention_mask_BT; None where the transformer takes none.
    free: frees its memory, for one that is too large to stay beside the transformer; a later call loads it again.
    """

    token_ids: Callable[[Sequence[str]], torch.Tensor]
    text_length: int
    digest: str
    weights_digest: str
    trained_guidance: tuple[float, float] | None
    embed: Embed
    row_bytes: int
    parameters: int | None = None
    weight_bytes: int | None = None
    text_mask: Callable[[torch.Tensor], torch.Tensor] | None = None
    free: Callable[[], None] | None = None

    def masks(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The mask of texts by its name, if the transformer takes one."""
        return {} if self.text_mask is None else {TEXT_MASK: self.text_mask(self.token_ids(texts))}

    def embeddings(self, texts: Sequence[str], device: torch.device) -> torch.Tensor:
        """encoder_hidden_states_BTD of texts, padded to the text length."""
        with torch.no_grad():
            return self.embed(self.token_ids(texts).to(device))


def weights_digest(folder: Path) -> str:
    """Digest of the weight files of a saved student."""
    return digest({file.name: weight_sha256(file) for file in sorted(folder.glob("*.safetensors"))})


def student_digest(folder: Path) -> str:
    """Digest of the weight files, the configuration and the tokenizer files of a saved student.

    The version fields and the formatting of config.json do not count.
    """
    config = {key: value for key, value in config_of(folder).items() if key not in _WRITTEN_BY}
    others = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.suffix in _TOKENIZER_ENDINGS and file.name not in _NO_TOKENIZER
    }
    return digest({"weights": weights_digest(folder), "config": config, "tokenizer": others})


def teacher_parts(student: str, pooled: Pooled | None = None) -> tuple[Role, ...]:
    """The required files of a teacher's folder: nothing of T5 for a student with its own tokenizer."""
    parts = PICTURE_PARTS if pooled != "clip" else (*PICTURE_PARTS, *POOLED_PARTS)
    if student == TEACHER:
        return (*parts, "large_text_encoder", "large_tokenizer")
    return parts if has_tokenizer(student_folder(Path(student))) else (*parts, "large_tokenizer")


def open_text_encoder(
    student: str,
    teacher: TeacherFolder,
    *,
    text_length: int | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: TextQuantization | None = None,
) -> TextEncoder:
    """Load the student of a run folder or an export with its training text length, or `teacher`.

    text_length, quantize: for the teacher only; default: its own length, and its weights as they are.
    Raises StudentError, TeacherError, SettingsError.
    """
    if student == TEACHER:
        return _of_teacher(teacher, teacher.checked_text_length(text_length), dtype, device, quantize)
    if quantize is not None:
        raise SettingsError(
            f"--quantize-text-encoder is {quantize}, but {student} is a student: export it with --quantize {quantize}, "
            f"and give the export"
        )
    return _of_student(student, teacher, text_length, device)


def _of_teacher(
    teacher: TeacherFolder,
    text_length: int,
    dtype: torch.dtype,
    device: torch.device,
    quantize: TextQuantization | None,
) -> TextEncoder:
    # Loaded on first use: T5-XXL is not read if all images exist, or the request is refused.
    loaded = cache(lambda: _teachers_encoder(teacher, dtype, device, quantize))
    weights = digest(teacher.weight_hashes("large_text_encoder"))
    if quantize is not None:
        check_quantizer(quantize)
        weights = digest({"weights": weights, "quantize": quantize})
    return TextEncoder(
        token_ids=_token_ids(teacher.part("large_tokenizer"), text_length, teacher.family),
        text_length=text_length,
        digest=weights,
        weights_digest=weights,
        trained_guidance=None,
        embed=lambda token_ids_BT: loaded().encode(token_ids_BT),
        row_bytes=text_length * _text_width(teacher) * dtype.itemsize,
        text_mask=_mask(teacher.family, teacher.pad_token_id),
        free=loaded.cache_clear,
    )


def _of_student(student: str, teacher: TeacherFolder, text_length: int | None, device: torch.device) -> TextEncoder:
    family, width, folder = teacher.family, _text_width(teacher), student_folder(Path(student))
    network = load_student(folder)
    check_fits(network, width, student, layers=family.text_layers, masked=family.masks_text)
    trained_length = int(network.config.text_length)
    if text_length not in (None, trained_length):
        raise SettingsError(
            f"--text-length is {text_length}, but {student} was trained with {trained_length} text tokens: a student "
            f"uses its own length; omit the option"
        )
    network.to(device)
    tokens = own_tokens(folder, network)
    own_folder = folder if tokens is not None or has_tokenizer(folder) else teacher.part("large_tokenizer")
    guidance = getattr(network.config, "trained_guidance", None)
    return TextEncoder(
        token_ids=_token_ids(own_folder, trained_length, family) if tokens is None else tokens.batch,
        text_length=trained_length,
        digest=student_digest(folder),
        weights_digest=weights_digest(folder),
        trained_guidance=None if guidance is None else (float(guidance[0]), float(guidance[1])),
        embed=lambda token_ids_BT: network(token_ids_BT)[0],
        row_bytes=trained_length * width * torch.float32.itemsize,
        parameters=parameter_count(network),
        weight_bytes=weight_bytes(folder),
        text_mask=_mask(family, network.config.pad_token_id),
    )


def _text_width(teacher: TeacherFolder) -> int:
    """D, the width of the embeddings that the transformer reads."""
    return teacher.family.text_width(teacher.config("transformer"))


def _teachers_encoder(
    teacher: TeacherFolder, dtype: torch.dtype, device: torch.device, quantize: TextQuantization | None
) -> TeacherTextEncoder:
    encoder = TeacherTextEncoder.load(teacher, dtype=dtype, device=device)
    if quantize is not None:
        quantize_text_encoder(encoder.model, quantize)
    return encoder


def _mask(family: Family, pad_token_id: int | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return partial(text_mask, pad_token_id=pad_token_id or 0) if family.masks_text else None


def _token_ids(folder: Path, text_length: int, family: Family) -> Callable[[Sequence[str]], torch.Tensor]:
    return partial(family.tokenizer(folder).padded, text_length=text_length)


def teacher_and_students(
    student: Path, teacher: TeacherFolder, *, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Embed]:
    """teacher, student, and untrained: the student's shape with random weights. StudentError if it does not match."""
    folder = student_folder(student)
    trained = load_student(folder).to(device)
    tokens = own_tokens(folder, trained)
    family = teacher.family
    check_fits(trained, _text_width(teacher), str(student), layers=family.text_layers, masked=family.masks_text)
    # A student with its own tokenizer may have positions for fewer tokens than the teacher.
    own, taught = trained.config.text_length, teacher.text_length
    if own > taught or (own < taught and tokens is None):
        raise StudentError(
            f"{student} was trained with {trained.config.text_length} text tokens, this teacher has "
            f"{teacher.text_length}: score it with its own teacher"
        )
    untrained = untrained_like(trained, seed=seed).to(device)
    encoder = TeacherTextEncoder.load(teacher, dtype=dtype, device=device)
    return {"teacher": encoder.encode, "student": _embed(trained, tokens), "untrained": _embed(untrained, tokens)}


def _embed(student: Student, tokens: StudentTokens | None) -> Embed:
    def embed(token_ids_BT: torch.Tensor) -> torch.Tensor:
        embedding_BTD: torch.Tensor = student(token_ids_BT)[0]
        return embedding_BTD

    return embed if tokens is None else OwnTokensEmbed(embed=embed, token_ids=tokens.batch)
