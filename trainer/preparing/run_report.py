"""Lines that a run prints before its first step."""

from collections.abc import Sequence

from secondcast.models.device import deterministic_algorithms
from secondcast.models.student.tokens import text_length_remark
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.preparing.checks import attention_notes, how_replayed
from secondcast.trainer.training_set import row_name


def report_kernels(objective: Objective, training_caches: Sequence[TrainingCache], progress: Progress) -> None:
    """Print how the transformer is replayed, where it differs from the recording or is deterministic."""
    if not objective.backbones:
        return
    for line in attention_notes(objective.settings, training_caches):
        progress.say(line)
    if objective.settings.deterministic:
        with deterministic_algorithms():
            progress.say(f"deterministic kernels; that of attention is {objective.backbones[0].attention_kernel}")


def report_run(trainer: Trainer, training_caches: Sequence[TrainingCache], progress: Progress) -> None:
    """Print what is trained, on how much, and how."""
    _report_caches(trainer, training_caches, progress)
    _report_modulation(trainer, training_caches, progress)
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    autocast = ", bfloat16 autocast" if trainer.autocast else ""
    several = f" of {len(training_caches)} caches" if len(training_caches) > 1 else ""
    replayed = f"; {how_replayed(trainer.settings)}" if trainer.objective.backbones else ""
    progress.say(
        f"student of {parameters:,} parameters in float32{autocast}; "
        f"{_rows_text(trainer)}{several} to train on, {len(trainer.held_out)} held out"
        f"{replayed}"
    )
    if remark := text_length_remark(trainer.train_state.plain_student, training_caches[0].cache.manifest.teacher):
        progress.say(remark)


def _rows_text(trainer: Trainer) -> str:
    counts = {"trajectory": 0, "prompt": 0}
    for source in trainer.dataset.sources:
        counts[row_name(source.cache)] += len(source.indices)
    return " and ".join(counted(count, name) for name, count in counts.items() if count)


def _report_caches(trainer: Trainer, training_caches: Sequence[TrainingCache], progress: Progress) -> None:
    for training_cache in training_caches:
        cache, began = training_cache.cache, len(training_cache.training_set.indices())
        kind, shards = cache.layout.rows
        there, name = cache.records.rows(kind), row_name(cache)
        if not cache.finished:
            progress.say(f"{cache.folder} is not finished: {there} of its {counted(shards.items, name)} are there")
        if began != there:
            progress.say(
                f"{trainer.run} keeps training on the {counted(began, name)} it started with, of {there} "
                f"that {cache.folder} has now: a new run folder uses all of them"
            )


def _report_modulation(trainer: Trainer, training_caches: Sequence[TrainingCache], progress: Progress) -> None:
    if (on_host := trainer.objective.host_modulation) is not None:
        progress.say(
            f"modulation vectors are computed on the host, a batch ahead, with {on_host.weights_bytes / 1e9:.3g} GB of "
            f"weights in its memory: the CPU rounds differently from a GPU, which the replay error measures; "
            f"--modulation "
            f"gpu keeps them on the GPU"
        )
    elif trainer.settings.modulation == "auto" and any(
        backbone.table is None and backbone.family.anatomy.modulation for backbone in trainer.objective.backbones
    ):
        clip = any(training_cache.cache.manifest.teacher.pooled == "clip" for training_cache in training_caches)
        why = "the pooled vectors of CLIP are part of them" if clip else "a table of these caches would be larger"
        progress.say(f"modulation is not precomputed: {why}; its weights stay in memory")
