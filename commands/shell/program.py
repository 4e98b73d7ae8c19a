"""The name of this program, for commands to copy."""

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """The command to type for this program: its name if it is on PATH, else its path."""
    found, path = shutil.which("secondcast"), Path(sys.argv[0])
    if path.name != "secondcast" or (found is not None and Path(found).resolve() == path.resolve()):
        return "secondcast"
    return shlex.quote(sys.argv[0])
