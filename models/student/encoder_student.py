"""Create students from any text encoder of transformers, with its own tokenizer or that of a language model."""

import copy
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from secondcast.models.families.registry import family_named
from secondcast.models.student.encoder_student_network import (
    EncoderStudent,
    EncoderStudentConfig,
    auto_class,
    encoder_within,
    make_encoder,
)
from secondcast.models.student.tokens import StudentTokens, read_tokens
from secondcast.models.weights.checked_loading import LOADING_FAILS, load_checked
from secondcast.models.weights.files import CheckpointSource
from secondcast.models.weights.hub import local_weights
from secondcast.storage_schemas.errors import StudentError, reason
from secondcast.storage_schemas.schema.manifest import Teacher

# Keys of the encoder's configuration that state its origin, or that students set themselves.
_NOT_KEPT = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("id2label", "label2id", "task_specific_params"),
)


def no_own_tokens(source: str) -> StudentError:
    """The error for a student with its own tokenizer and a teacher that masks padding."""
    return StudentError(
        f"{source} has its own tokenizer, but this teacher reads a mask of T5's tokens: give a student that reads T5's "
        f"tokens, such as a T5"
    )


def new_encoder_student(
    source: str, teacher: Teacher, *, pretrained: bool, dropout: float, seed: int, projection_rank: int | None
) -> EncoderStudent:
    """A student with the text encoder of a folder or hub repository, fp32. StudentError if there is none.

    Uses the encoder of an encoder-decoder, the text model of a multimodal model, and all of a causal model. In place of
    T5 its text length is the teacher's, or its maximum number of positions if that is less; in place of a language
    model it reads the teacher's token ids.
    """
    if teacher.text_mask is not None:
        raise no_own_tokens(source)
    config = _text_part(_config_of(source))
    replaces_model = teacher.text_layers is not None
    tokens = None if replaces_model else read_tokens(source, text_length=teacher.text_length)
    settings = with_dropout(_settings_of(config), dropout)
    if replaces_model:
        check_reads_tokens(source, settings, teacher)
    encoder = _pretrained(source, settings) if pretrained else _random(source, settings)
    width, longest = _width(encoder, source), longest_text(encoder)
    if tokens is not None:
        _check_vocabulary(encoder, tokens, source)
    torch.manual_seed(seed)
    student = EncoderStudent(
        EncoderStudentConfig(
            encoder_config=settings,
            project_in_dim=width,
            project_out_dim=teacher.text_width,
            projection_dropout=dropout,
            text_length=teacher.text_length if longest is None else min(teacher.text_length, longest),
            longest_text=longest,
            pad_token_id=teacher.pad_token_id if tokens is None else tokens.pad_token_id,
            pad_is_end=tokens is not None and tokens.pad_is_end,
            projection_rank=projection_rank,
            hidden_state_layers=teacher.text_layers,
        )
    )
    if pretrained:
        student.encoder.load_state_dict(encoder.state_dict())
    _set_dropout(student, dropout)
    return student.float()


def check_reads_tokens(source: str, settings: dict[str, Any], teacher: Teacher) -> None:
    """Raise StudentError unless an encoder can read the token ids of a teacher with a language model.

    settings: its configuration.
    """
    usual = family_named(teacher.family).student
    found, needed = settings.get("vocab_size"), teacher.text_encoder_config["vocab_size"]
    if found != needed:
        raise StudentError(
            f"{source} has a vocabulary of {found}, but this teacher's has {needed} tokens: a student of it reads the "
            f"tokens of its language model; give one with the same tokenizer, such as {usual}"
        )
    longest = settings.get("max_position_embeddings")
    if isinstance(longest, int) and longest < teacher.text_length:
        raise StudentError(
            f"{source} has positions for {longest} tokens, but the cache's token ids are {teacher.text_length}: a "
            f"student of this teacher reads all of them; give a longer one, such as {usual}"
        )


def rebuilt(
    config: EncoderStudentConfig, weights: dict[str, Any] | None, teacher: Teacher, *, dropout: float, seed: int
) -> EncoderStudent:
    """A student for this teacher in the shape of an earlier one, with its weights or random ones, fp32."""
    config = copy.deepcopy(config)
    config.encoder_config = with_dropout(config.encoder_config, dropout)
    config.projection_dropout = dropout
    longest = config.longest_text
    config.text_length = teacher.text_length if longest is None else min(teacher.text_length, longest)
    if hasattr(config, "trained_guidance"):
        del config.trained_guidance
    torch.manual_seed(seed)
    again = EncoderStudent(config).float()
    if weights is not None:
        again.load_state_dict(weights)
    _set_dropout(again, dropout)
    return again


def with_dropout(settings: dict[str, Any], dropout: float) -> dict[str, Any]:
    """An encoder's configuration with all its dropout probabilities replaced, including nested ones."""
    return {key: _replaced(key, value, dropout) for key, value in settings.items()}


def _replaced(key: str, value: Any, dropout: float) -> Any:
    if isinstance(value, dict):
        return with_dropout(value, dropout)
    named = "dropout" in key or key.endswith("_pdrop")
    # None is a choice of the encoder's class, and a boolean is not a probability.
    return dropout if named and isinstance(value, int | float) and not isinstance(value, bool) else value


def _set_dropout(student: EncoderStudent, dropout: float) -> None:
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def longest_text(encoder: Any) -> int | None:
    """Maximum number of tokens of an encoder; None if its positions are relative."""
    reach = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(reach, int) or reach < 1:
        return None
    for name, module in encoder.named_modules():
        # RoBERTa-like models start positions after the padding index.
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return reach - module.padding_idx - 1
    return reach


def _config_of(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LOADING_FAILS as error:
        raise StudentError(
            f"{source} has no configuration that transformers can read ({reason(error)}): give a text encoder that "
            f"AutoModel can load"
        ) from error


def _text_part(config: Any) -> Any:
    if "text_config" in type(config).sub_configs:
        return config.text_config
    return config


def _settings_of(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    settings = {key: value for key, value in settings.items() if key not in _NOT_KEPT}
    if "use_cache" in settings:
        settings["use_cache"] = False
    if auto_class(config).__name__ == "AutoModelForTextEncoding":
        settings["is_encoder_decoder"] = False
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # Where transformers 4 reads it; it would take its default, silently.
        settings["rope_theta"] = rope["rope_theta"]
    return settings


def _random(source: str, settings: dict[str, Any]) -> Any:
    try:
        return make_encoder(settings)
    except LOADING_FAILS as error:
        raise _no_text_encoder(source, settings, reason(error)) from error


def _pretrained(source: str, settings: dict[str, Any]) -> Any:
    found = CheckpointSource(
        where=source,
        error=StudentError,
        again="download it again, or give --init random",
    )
    folder = local_weights(source, found)
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            shaped = auto_class(config).from_config(config, attn_implementation="eager", trust_remote_code=False)
        kind, needed = type(shaped), _names_of_encoder(shaped)
    except LOADING_FAILS as error:
        raise found.refused(reason(error)) from error
    model = load_checked(
        kind, folder, found, config=config, dtype=torch.float32, other_parts=True, needed=needed,
        attn_implementation="eager",
    )  # fmt: skip
    return encoder_within(model)


def _names_of_encoder(model: Any) -> set[str]:
    """Names of the encoder's tensors in a model, which is reduced to the encoder."""
    encoder = encoder_within(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is encoder), "")
    return {f"{prefix}{name}" for name in encoder.state_dict()}


def _width(encoder: Any, source: str) -> int:
    """Width of the last hidden state of two tokens, which only a text encoder returns."""
    try:
        with torch.no_grad():
            ids_BT = torch.zeros(1, 2, dtype=torch.int64)
            hidden_BTD = encoder.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
    except Exception as error:
        raise _no_text_encoder(source, encoder.config.to_dict(), reason(error)) from error
    if hidden_BTD.shape[:2] != (1, 2):
        raise _no_text_encoder(source, encoder.config.to_dict(), f"2 tokens have the shape {tuple(hidden_BTD.shape)}")
    return int(hidden_BTD.shape[2])


def _check_vocabulary(encoder: Any, tokens: StudentTokens, source: str) -> None:
    rows = int(encoder.get_input_embeddings().num_embeddings)
    if tokens.vocabulary > rows:
        raise StudentError(
            f"the tokenizer of {source} has token ids up to {tokens.vocabulary - 1}, but its encoder has a vocabulary "
            f"of {rows}: give a folder whose tokenizer and config.json are of one model"
        )


def _no_text_encoder(source: str, settings: dict[str, Any], reason: str) -> StudentError:
    return StudentError(
        f"{source} is a {settings.get('model_type')!r} model without a last hidden state for token ids ({reason}): "
        "give a text encoder such as google-t5/t5-base or FacebookAI/roberta-base"
    )
