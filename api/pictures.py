"""`secondcast.film_strips`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secondcast.api.names import resolve_teacher
from secondcast.inspection.images import each_film_strip, shown_steps
from secondcast.inspection.sheet import stacked
from secondcast.models.device import quiet_libraries, usable_device
from secondcast.models.teacher.folder import DECODE_PARTS
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache

if TYPE_CHECKING:
    from PIL.Image import Image


def film_strips(
    cache: Cache,
    indices: Sequence[int],
    *,
    num_frames: int | None = None,
    teacher: str | Path | None = None,
    device: str = "auto",
) -> "Image":
    """Decode trajectories step by step with the teacher's VAE, as `secondcast inspect images` does.

    indices: of the trajectories.
    num_frames: number of steps shown, spread evenly; None: all.
    teacher: location of vae/; None: as recorded.

    Raises SecondcastError: TeacherError, NotInCacheError, NoTrajectoriesError.
    """
    cache.require_trajectories("film_strips")
    if not indices:
        raise SettingsError("film_strips() has no indices, expected at least one, such as [0]")
    quiet_libraries()
    found = resolve_teacher(cache.manifest.source if teacher is None else str(teacher), DECODE_PARTS)
    steps = shown_steps(cache.manifest.sampling.steps, num_frames)
    return stacked([strip for _, strip in each_film_strip(cache, found, indices, steps, device=usable_device(device))])
