"""What a run loads: the transformer, its first blocks or its text projection, and the student's tokenizer."""

from collections.abc import Sequence

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.recorded_backbone import load_recorded_backbone
from secondcast.models.schedule import DTYPES
from secondcast.models.student.pieces import check_same_pieces
from secondcast.models.student.student import Student, takes_weights
from secondcast.models.student.tokens import StudentTokens, own_tokens
from secondcast.models.teacher.context_projection import ContextProjection, load_context_projection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.preparing.checks import check_backend
from secondcast.trainer.settings import TrainSettings


def load_objective(
    settings: TrainSettings,
    training_caches: list[TrainingCache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    *,
    ranks: int = 1,
) -> Objective:
    """The losses of a run with the part of the frozen transformer that they need."""
    manifests = [training_cache.cache.manifest for training_cache in training_caches]
    sampled = [manifest for manifest in manifests if not manifest.is_text]
    context_ID, backbones = None, []
    if isinstance(teacher, ContextProjection):
        context_ID = teacher.context_ID.to(device)
    elif teacher is not None and settings.projects:
        context_ID = load_context_projection(teacher, manifests[0].teacher, device)
    if isinstance(teacher, TeacherFolder) and settings.teacher_use == "transformer":
        loaded = _load_backbone(settings, sampled, teacher, device, ranks)
        backbones = [loaded.at(recorded_geometry(manifest.sampling)) for manifest in sampled]
    sigmas = [manifest.sampling.sigmas for manifest in sampled]
    return Objective(settings=settings, backbones=backbones, context_ID=context_ID, sigmas=sigmas)


def _load_backbone(
    settings: TrainSettings, manifests: Sequence[Manifest], teacher: TeacherFolder, device: torch.device, ranks: int
) -> Backbone:
    dtype = DTYPES[_backbone_dtype(settings, manifests[0])]
    check_backend(settings, teacher, dtype, device)
    return load_recorded_backbone(
        manifests,
        teacher,
        dtype=dtype,
        batch_rows=max(1, settings.replay_rows // ranks),
        options=settings.memory,
        attention_backend=settings.attention_backend,
        device=device,
        blocks=settings.loaded_blocks,
    )


def load_own_tokens(settings: TrainSettings, source: str, student: Student) -> StudentTokens | None:
    """The tokenizer of a student that has its own; SettingsError where a stage compares embeddings by position."""
    tokens = own_tokens(source, student)
    compares = (stage for stage in settings.stages if stage.needs_embeddings or stage.context_loss_weight)
    if tokens is not None and (stage := next(compares, None)):
        weight = "embedding-loss-weight" if stage.embedding_loss_weight else "context-loss-weight"
        value = stage.embedding_loss_weight or stage.context_loss_weight
        what = f"{weight} is {value:g}" if stage.predicts else f"loss is {stage.loss}"
        raise SettingsError(
            f"{what}, but {source} reads prompts with its own tokenizer: its embeddings are not those of T5-XXL's "
            f"tokens, position by position; start with --loss vision, which does not compare them"
        )
    return tokens


def check_pieces(settings: TrainSettings, source: str, tokens: StudentTokens | None, cache: Cache) -> None:
    """Raise StudentError for a student that has learnt other pieces under the token ids that it is to read.

    tokens: of its own tokenizer, with which it may have any pieces.
    """
    if tokens is None and takes_weights(source, settings.init):
        fix = "give one with the teacher's tokenizer, or train it from scratch with --init random"
        check_same_pieces(source, cache.tokenizer_files, fix=fix)


def uses_autocast(settings: TrainSettings, manifest: Manifest, device: torch.device) -> bool:
    """Whether the student computes under bf16 autocast."""
    if settings.student_dtype == "auto":
        return device.type == "cuda" and _backbone_dtype(settings, manifest) == "bfloat16"
    return settings.student_dtype == "bfloat16-autocast"


def _backbone_dtype(settings: TrainSettings, manifest: Manifest) -> str:
    return manifest.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype
