"""Create, load and save students."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel
from transformers.configuration_utils import PretrainedConfig

from secondcast.models.families.registry import family_named
from secondcast.models.student.distillt5 import load_published, student_config
from secondcast.models.student.encoder_student import check_reads_tokens, new_encoder_student, no_own_tokens, rebuilt
from secondcast.models.student.encoder_student_network import EncoderStudent, EncoderStudentConfig
from secondcast.models.student.folder import check_is_student, config_of, is_published_form, is_quantized
from secondcast.models.student.projection_rank import check_kept_rank, check_rank, layer_width
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.models.weights.checked_loading import load_checked
from secondcast.models.weights.files import CheckpointSource, holds_weights
from secondcast.models.weights.hub import local_weights
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.schema.manifest import Teacher

Student = SecondcastStudent | EncoderStudent
"""Either replaces a large text encoder: token ids [B, T] in, embeddings [B, T, project_out_dim] out."""


def new_student(
    source: str, teacher: Teacher, *, init: str, dropout: float, seed: int, projection_rank: int | None = None
) -> Student:
    """A student that fits a teacher, fp32.

    source: folder or hub name of a text encoder, of its config.json (and tokenizer) alone, or of an earlier export. T5
        reads the cache's token ids; any other kind, and a T5 with a smaller vocabulary, becomes an EncoderStudent with
        its own tokenizer (see tokens.own_tokens), or in place of a language model with the teacher's.
    init: "pretrained", "random" or "auto" (pretrained if weights are available).
    dropout: probability in encoder and projection.
    projection_rank: of a new projection's last matrix; None: full. An earlier student keeps its own.

    Raises StudentError for a width or vocabulary that does not fit the teacher, if `source` is not a text encoder, or
    is quantized, SettingsError for a rank that is too large, or not that of an earlier student.
    """
    found = _source_config(source)
    kind = found.get("model_type")
    _check_form(source, found, projection_rank)
    check_rank(projection_rank, layer_width(teacher))
    if teacher.text_mask is not None and kind == EncoderStudentConfig.model_type and _LAYERS not in found:
        raise no_own_tokens(source)
    pretrained = takes_weights(source, init)
    if kind == EncoderStudentConfig.model_type:
        return _again(source, teacher, pretrained=pretrained, dropout=dropout, seed=seed)
    ours = kind == StudentConfig.model_type or is_published_form(found)
    if teacher.text_layers is not None and (ours or kind == "t5"):
        raise StudentError(
            f"{source} is a T5, but this teacher has a language model, whose tokens its student reads: give "
            f"{family_named(teacher.family).student}, or another with the same tokenizer"
        )
    if not ours and (kind != "t5" or _has_another_tokenizer(source, found, teacher)):
        return new_encoder_student(
            source, teacher, pretrained=pretrained, dropout=dropout, seed=seed, projection_rank=projection_rank
        )
    config = _t5_config(source)
    if isinstance(config, StudentConfig) and pretrained:
        return _continued(source, config, teacher, dropout)
    if config.vocab_size < teacher.text_encoder_config["vocab_size"]:
        raise StudentError(
            f"{source} has a vocabulary of {config.vocab_size}, but the cache's token ids go up to "
            f"{teacher.text_encoder_config['vocab_size'] - 1}: use a student with the teacher's tokenizer, or with its "
            f"own next to its config.json"
        )
    if projection_rank is not None:
        config.projection_rank = projection_rank
    return _t5_student(source, config, teacher, pretrained=pretrained, dropout=dropout, seed=seed)


def takes_weights(source: str, init: str) -> bool:
    """Whether `new_student` loads the weights of its source."""
    return init == "pretrained" or (init == "auto" and _has_weights(source))


def _check_form(source: str, config: dict[str, Any], projection_rank: int | None) -> None:
    """Raise an error for a quantized student, or one with another projection than the asked one."""
    if is_quantized(config):
        raise StudentError(
            f"{source} has {config['quantization']} weights, which cannot be trained: give the run that it was "
            f"exported from, or an export without --quantize"
        )
    check_kept_rank(projection_rank, source, config)


def _t5_student(
    source: str, config: T5Config, teacher: Teacher, *, pretrained: bool, dropout: float, seed: int
) -> SecondcastStudent:
    encoder = _pretrained_t5(source) if pretrained else None
    torch.manual_seed(seed)
    settings = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    settings |= {"dropout_rate": dropout, "architectures": None}
    student = SecondcastStudent(
        StudentConfig(
            project_in_dim=config.d_model,
            project_out_dim=teacher.text_width,
            projection_dropout=dropout,
            text_length=teacher.text_length,
            **(settings | _mask_of(teacher)),
        )
    )
    if encoder is not None:
        student.encoder.load_state_dict(encoder.state_dict())
    return student.float()


def _pretrained_t5(source: str) -> T5EncoderModel:
    found = CheckpointSource(where=source, error=StudentError, again="download it again, or --init random")
    folder = local_weights(source, found, pickles=True)
    encoder: T5EncoderModel = load_checked(T5EncoderModel, folder, found, dtype=torch.float32, pickles=True)
    return encoder


# The key of the configuration of a student in place of a language model.
_LAYERS = "hidden_state_layers"
_OWN_KEYS = (
    "project_in_dim",
    "project_out_dim",
    "projection_dropout",
    "text_length",
    "quantization",
    "model_type",
    "auto_map",
    "masks_padding",
)


def _mask_of(teacher: Teacher) -> dict[str, bool]:
    """The key of a student's configuration by which it reads padding as its teacher does."""
    return {} if teacher.text_mask is None else {"masks_padding": True}


def untrained_like(student: Student, *, seed: int) -> Student:
    """A student of the same shape with random floating-point weights, in eval mode."""
    torch.manual_seed(seed)
    config = copy.deepcopy(student.config)
    if hasattr(config, "quantization"):
        del config.quantization
    made: Student = type(student)(config).float().eval()
    if student.negative_TD is not None:
        # It is not trained: part of the shape.
        made.put_negative(student.config.negative_token_ids, student.negative_TD.clone())
    return made


def load_student(folder: Path) -> Student:
    """A saved student of either kind or in DistillT5's format, fp32, in eval mode; StudentError if there is none."""
    check_is_student(folder)
    source = CheckpointSource(where=str(folder), error=StudentError, again="export the run again")
    config = config_of(folder)
    if is_published_form(config):
        return load_published(folder, config, source)
    kind = SecondcastStudent if config["model_type"] == StudentConfig.model_type else EncoderStudent
    student: Student = load_checked(kind, folder, source, dtype=torch.float32)
    return student


def save_student(student: Student, folder: Path, *, tokenizer: dict[str, bytes] | None) -> None:
    """Write a folder of a pipeline's text encoder: config, safetensors, modelling file, tokenizer files."""
    # transformers copies the modelling file and names it in config.json, because the classes have an _auto_class.
    student.save_pretrained(folder, safe_serialization=True)
    for file_name, data in sorted((tokenizer or {}).items()):
        (folder / file_name).write_bytes(data)
    mode = durable.usual_mode(folder)
    for written in folder.iterdir():
        # safetensors writes files that only the owner can read.
        written.chmod(mode)


def vocabulary(student: Student) -> int:
    """Number of token ids that a student knows."""
    # Not the rows of the token embedding, which a quantized student holds in another form.
    config = student.config.encoder_config if isinstance(student, EncoderStudent) else student.config.to_dict()
    return int(config["vocab_size"])


def check_fits(
    student: Student, text_width: int, where: str, *, layers: Sequence[int] | None = None, masked: bool | None = None
) -> None:
    """Raise StudentError unless a student's embeddings have the backbone's text width, and the layers of the teacher.

    masked: whether the teacher masks padding, for a student that is used as it is; None: it will be trained.
    """
    _check_width(student.config.project_out_dim, text_width, where)
    _check_layers(student.config, layers, where)
    if masked and isinstance(student, EncoderStudent):
        raise no_own_tokens(where)
    if masked is False and getattr(student.config, "masks_padding", False):
        raise StudentError(
            f"{where} gives zeros for padding, which this teacher reads: it was trained for one with a mask, such as "
            f"PixArt-Sigma; train it on a cache of this one"
        )


def _check_width(width: int, text_width: int, where: str) -> None:
    if width != text_width:
        raise StudentError(
            f"{where} has embeddings of width {width}, but this teacher reads {text_width}: a student only fits the "
            f"teacher it was trained for; train one from this cache"
        )


def _check_layers(config: PretrainedConfig, expected: Sequence[int] | None, where: str) -> None:
    found = getattr(config, _LAYERS, None)
    if found != (None if expected is None else list(expected)):
        own, read = (
            "the last layer of its text encoder" if layers is None else f"the layers {', '.join(map(str, layers))}"
            for layers in (found, expected)
        )
        raise StudentError(
            f"{where} gives {own}, but this teacher reads {read}: it was trained for another kind; train one from a "
            f"cache of this one"
        )


def _again(source: str, teacher: Teacher, *, pretrained: bool, dropout: float, seed: int) -> EncoderStudent:
    config = EncoderStudentConfig.from_pretrained(source)
    _check_width(config.project_out_dim, teacher.text_width, source)
    _check_layers(config, teacher.text_layers, source)
    if teacher.text_layers is not None:
        check_reads_tokens(source, config.encoder_config, teacher)
    weights = load_student(_local_student(source)).state_dict() if pretrained else None
    return rebuilt(config, weights, teacher, dropout=dropout, seed=seed)


def _continued(source: str, config: StudentConfig, teacher: Teacher, dropout: float) -> SecondcastStudent:
    student = load_student(_local_student(source))
    assert isinstance(student, SecondcastStudent)
    check_fits(student, teacher.text_width, source)
    student.config.dropout_rate = dropout
    # The text length from now on; an export sets the other values.
    student.config.text_length = teacher.text_length
    if student.negative_TD is not None and getattr(student.config, "masks_padding", False) != bool(_mask_of(teacher)):
        # Of a teacher that gives something else for padding.
        student.put_negative(None)
    student.config.masks_padding = bool(_mask_of(teacher))
    if not student.config.masks_padding:
        del student.config.masks_padding
    if hasattr(student.config, "trained_guidance"):
        del student.config.trained_guidance
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return student


def _local_student(source: str) -> Path:
    """The folder of a student by folder or hub name."""
    return local_weights(source, CheckpointSource(where=source, error=StudentError, again="download it again"))


def _has_another_tokenizer(source: str, config: dict[str, Any], teacher: Teacher) -> bool:
    """Whether a T5 cannot take the cache's token ids but brings a tokenizer of its own, as ByT5 does."""
    if config.get("vocab_size", T5Config().vocab_size) >= teacher.text_encoder_config["vocab_size"]:
        return False
    return not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file()


def _source_config(source: str) -> dict[str, Any]:
    """config.json of a folder or hub name; StudentError if there is none that names its kind."""
    if Path(source).is_file():
        raise StudentError(
            f"{source} is a file, expected a folder with the config.json of a text encoder, or a hub name: single-file "
            f"checkpoints are not supported; give the folder"
        )
    if Path(source).is_dir():
        file = Path(source) / "config.json"
        if not file.is_file():
            raise StudentError(f"{source} has no config.json: give a text encoder, the config of one, or an export")
        found = config_of(Path(source))
        if not found:
            raise StudentError(
                f"{file} cannot be read, expected the JSON of a text encoder's configuration: download it again"
            )
        if not isinstance(found.get("model_type"), str):
            raise StudentError(
                f"{source}/config.json has no model_type, expected the configuration of a text encoder as transformers "
                f"writes it, such as that of google-t5/t5-base"
            )
        return found
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise StudentError(
            f"no student {source!r}: there is no such folder; give a folder, or a hub name such as google-t5/t5-base"
        )
    try:
        settings: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
    except Exception as error:
        raise StudentError(
            f"no student {source!r}: it is not a folder, and cannot be downloaded from the hub "
            f"({type(error).__name__}); give a folder, or a hub name such as google-t5/t5-base"
        ) from error
    return settings


def _t5_config(source: str) -> T5Config:
    """The configuration of a student that reads the cache's token ids; StudentError for any other."""
    found = _source_config(source)
    kind = found.get("model_type")
    if kind == StudentConfig.model_type:
        return StudentConfig.from_pretrained(source)
    if is_published_form(found):
        return student_config(found)
    if kind != "t5":
        raise StudentError(f"{source} is a {kind!r} model, expected t5: plans only support T5 students")
    return T5Config.from_pretrained(source)


def _has_weights(source: str) -> bool:
    # Weights in another format, or incomplete ones, are an error, not a reason for random weights.
    return not Path(source).is_dir() or holds_weights(Path(source))
