"""Memory of this process on the host."""

import contextlib
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def host_peak_bytes() -> int:
    """Most resident bytes so far; where the system can begin anew (see peak_memory in a build), since then."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
            return int(found[1]) * 1024
    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
