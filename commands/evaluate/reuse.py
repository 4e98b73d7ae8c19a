"""What a table took over from an earlier run of its command, said in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reused:
    """Counts what was taken over, by name."""

    names: list[str] = field(default_factory=list)
    count: int = 0

    def note(self, name: str, *, reused: bool) -> None:
        """One more was needed; `reused`: it was there."""
        self.count += 1
        if reused:
            self.names.append(name)

    def say(self, progress: Any, folder: Path | None) -> None:
        """Tell it, where anything was taken over."""
        if folder is not None and self.names:
            progress.say(f"reused {len(self.names)} of {self.count}: {', '.join(self.names)} (in {folder})")
