"""The replay check: the teacher's own embedding, replayed by the backbone at hand, must give what was recorded."""

from collections.abc import Sequence

from secondcast.storage_schemas.progress import Progress
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.validation import bias_text, check_replay_error, replay_error_text


def check_replay(
    trainer: Trainer, training_caches: Sequence[TrainingCache], progress: Progress, *, ignore_replay_error: bool
) -> None:
    """Measure and print the replay error; TeacherError where it is too large, unless it is to be ignored."""
    if not trainer.objective.predicts or not trainer.settings.replay_check:
        return
    # Those with trajectories are first.
    sampled = [training_cache for training_cache in training_caches if not training_cache.cache.manifest.is_text]
    stored = [training_cache.cache.manifest.keeps_embeddings for training_cache in sampled]
    for training_cache in (one for one, has_one in zip(sampled, stored, strict=True) if not has_one):
        progress.say(
            f"no replay error: {training_cache.cache.folder} was built with --no-store-embeddings; "
            f"a cache with --store-embeddings has one"
        )
    if not any(stored):
        return
    replay_error = trainer.measure_replay_error([number for number, has_one in enumerate(stored) if has_one])
    recorded, here = training_caches[0].cache.manifest.sampling.quantize, trainer.settings.quantize
    progress.say(replay_error_text(replay_error, recorded, here))
    if not ignore_replay_error:
        check_replay_error(replay_error, recorded, here)
    if remark := bias_text(replay_error, recorded, here):
        progress.say(remark)
