"""The job of a worker in another process or on another machine: a line of JSON. The rest is in the cache."""

from pathlib import Path
from typing import Self

import torch

from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.teacher.folder import TeacherFolder, build_parts, find_teacher
from secondcast.storage_schemas.io.folders import location_of, open_folder
from secondcast.storage_schemas.reader import prompt_table, read_manifest
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.recording import Pooled
from secondcast.storage_schemas.writer import CacheWriter


class Job(Record):
    """A share of an existing cache. If `teacher_path` is absent on this machine, `teacher` is looked up again."""

    location: str
    teacher: str
    teacher_path: str
    config: WorkerConfig
    threads: int | None

    @classmethod
    def of(cls, cache: CacheWriter, teacher: TeacherFolder, config: WorkerConfig, threads: int | None) -> Self:
        """The job of workers that build this cache."""
        return cls(
            location=location_of(cache.folder),
            teacher=teacher.pinned_source,
            teacher_path=str(teacher.path.resolve()),
            config=config,
            threads=threads,
        )

    def writer(self) -> CacheWriter:
        """A writer of the cache, by its own manifest and prompts."""
        folder = open_folder(self.location)
        manifest = read_manifest(folder)
        return CacheWriter(folder, manifest, list(prompt_table(folder, manifest, verify="once")))

    def find_teacher(self, pooled: Pooled) -> TeacherFolder:
        """The teacher's folder on this machine."""
        path = Path(self.teacher_path)
        if path.is_dir():
            return TeacherFolder(path=path, source=self.teacher)
        return find_teacher(self.teacher, build_parts(pooled))

    def begin(self) -> None:
        """Settings of the process."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
