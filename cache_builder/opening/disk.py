"""Whether the disk has room for what a build will write, asked before it begins."""

import shutil
from pathlib import Path

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.folders import Location, is_remote, open_folder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import read_manifest
from secondcast.storage_schemas.schema.commits import Records, read_records
from secondcast.storage_schemas.schema.manifest import MANIFEST_FILE, Manifest
from secondcast.storage_schemas.sizes import remaining_bytes

_MIB, _GIB = 2**20, 2**30


def free_disk(location: Location) -> tuple[Path, int]:
    """The nearest folder of a local path that exists, and the free bytes of its disk."""
    path = Path(location).absolute()
    while not path.exists():
        path = path.parent
    return path, shutil.disk_usage(path).free


def check_disk(
    location: Location, manifest: Manifest, progress: Progress, *, skip_disk_check: bool, free_bytes: int | None = None
) -> None:
    """Raise SettingsError where the disk has less room than the missing shards may need; `force` makes it a remark.

    free_bytes: instead of what the disk says. Object stores are not asked; a cache of other settings is not ours to
    judge.
    """
    if is_remote(location):
        return
    folder, records = open_folder(location), Records(())
    if folder.size(MANIFEST_FILE) is not None:
        if read_manifest(folder).digests()["prompts"] != manifest.digests()["prompts"]:
            return
        records = read_records(folder)[0]
    low, high = remaining_bytes(manifest, records)
    where, free = free_disk(location)
    free = free if free_bytes is None else free_bytes
    if high <= free:
        return
    unit, name = (_GIB, "GiB") if high >= _GIB else (_MIB, "MiB")
    need = f"{low / unit:,.1f}" if low == high else f"{low / unit:,.1f} to {high / unit:,.1f}"
    problem = f"{location} needs {need} {name} more (estimated), the disk of {where} has {free / unit:,.1f} {name} free"
    if skip_disk_check:
        progress.say(f"{problem}: going on, as --skip-disk-check says")
        return
    raise SettingsError(
        f"{problem}: a build that fills the disk stops; give a smaller --limit, a smaller --compression (compact; int8 with "
        f"--latents stored), a folder on another disk, or --skip-disk-check"
    )
