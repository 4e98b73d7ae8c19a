"""The device of a process, and what its runs share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.modulation_table import Conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from tests.simulated_cuda.device.simulated import CUDA, SimulatedCuda
from tests.simulated_cuda.runs import flux


@dataclass
class Session:
    """Keeps the last transformer, and the caches in a folder."""

    device: SimulatedCuda
    folder: Path
    _caches: dict[str, Cache] = field(default_factory=dict)
    _held: tuple[Any, Backbone] | None = None

    def cache(self, name: str, manifest: Manifest, *, held_out: bool = False) -> Cache:
        """A cache by its name."""
        if name not in self._caches:
            self._caches[name] = flux.cache_of(self.folder / name, manifest, held_out=held_out)
        return self._caches[name]

    def backbone(self, key: Any, manifest: Manifest, options: MemoryOptions, conditions: Conditions | None) -> Backbone:
        """The transformer of a cache on the device; the last one if its key is the same."""
        if self._held is None or self._held[0] != key:
            self.release()
            backbone = Backbone.holding(
                flux.transformer(self.device.without_data, manifest),
                recorded_geometry(manifest.sampling),
                text_length=manifest.teacher.text_length,
                device=CUDA,
                options=options,
                conditions=conditions,
            )
            self._held = key, backbone
        return self._held[1]

    def release(self) -> None:
        """Free the transformer, and begin the peaks without it."""
        self._held = None
        self.device.release()
