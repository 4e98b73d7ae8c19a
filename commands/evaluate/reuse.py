"""Results that a table reuses from an earlier run of its command, reported in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Reused:
    """Counts the reused results, by name."""

    names: list[str] = field(default_factory=list)
    count: int = 0

    def note(self, name: str, *, reused: bool) -> None:
        """Count one result; `reused`: it existed."""
        self.count += 1
        if reused:
            self.names.append(name)

    def say(self, progress: Any, folder: Path | None) -> None:
        """Report the reused results, if there are any."""
        if folder is not None and self.names:
            progress.say(f"reused {len(self.names)} of {self.count}: {', '.join(self.names)} (in {folder})")
