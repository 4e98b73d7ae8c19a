"""Compiles shim.cpp and loads it into a process that has not imported torch."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PINNED = re.findall(r"^torch==(\S+)$", (HERE.parents[2] / "constraints.txt").read_text(), re.MULTILINE)[0]
LINKED = ("c10", "torch_cpu")


def torch_folder() -> Path:
    """The installed torch, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def missing() -> str | None:
    """Why the simulation cannot run here; None where it can."""
    if (found := version("torch").partition("+")[0]) != PINNED:
        return f"torch is {found}, the simulation of CUDA is made for {PINNED} (constraints.txt)"
    if any((torch_folder() / "lib").glob("libtorch_cuda.*")):
        return "torch is a CUDA build, the simulation of CUDA needs a CPU build"
    if not (torch_folder() / "include/ATen/detail/CUDAHooksInterface.h").is_file():
        return f"the C++ headers of torch are missing in {torch_folder()}"
    return None if shutil.which("g++") else "g++ is not installed: it compiles the simulated CUDA device"


def compile_shim(library: Path) -> None:
    """Compile the shim into a file."""
    torch = torch_folder()
    command = ["g++", "-shared", "-fPIC", "-std=c++20", str(HERE / "shim.cpp"), "-o", str(library)]
    command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", *(f"-l{name}" for name in LINKED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load_shim(library: Path) -> None:
    """Load it before torch, which looks for a CUDA device when it is imported."""
    assert "torch" not in sys.modules, "the shim is loaded before torch is imported"
    for file in (*(torch_folder() / f"lib/lib{name}.so" for name in LINKED), library):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
