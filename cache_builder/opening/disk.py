"""Checks that the disk has room for a build before it starts."""

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
    """The nearest existing parent folder of a local path, and the free bytes of its disk."""
    path = Path(location).absolute()
    while not path.exists():
        path = path.parent
    return path, shutil.disk_usage(path).free


def check_disk(
    location: Location, manifest: Manifest, progress: Progress, *, skip_disk_check: bool, free_bytes: int | None = None
) -> None:
    """Raise SettingsError if the disk has less room than the missing shards may need.

    Object stores, and caches with other settings, are not checked.
    skip_disk_check: print a warning instead.
    free_bytes: replaces the free space of the disk.
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
    problem = (
        f"{location} needs {need} {name} more (estimated), but the disk of {where} has {free / unit:,.1f} {name} free"
    )
    if skip_disk_check:
        progress.say(f"{problem}: building anyway because of --skip-disk-check")
        return
    raise SettingsError(
        f"{problem}: a build stops when the disk is full; give a smaller --limit, a stronger --compression (lossless; "
        f"int8 with --latents stored), a folder on another disk, or --skip-disk-check"
    )
