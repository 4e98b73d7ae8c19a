"""Programs of cards and pages, run as a reader runs them: in a process and a folder of their own, without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs(page: str) -> list[str]:
    """The Python programs of a Markdown page."""
    return _BLOCK.findall(page)


def run_program(program: str, folder: Path, *words: str | Path, without_us: bool = False) -> None:
    """Run a program in a folder, with words behind it. without_us: Secondcast is not installed for it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf-home"), "OMP_NUM_THREADS": "1"}
    (folder / "program.py").write_text(program)
    interpreter = ["program.py"]
    if without_us:
        # -S and the packages folders by hand: an editable installation of ours is not found.
        sites = [path for path in sys.path if path.endswith("site-packages")]
        interpreter = ["-S", "-c", f"import sys; sys.path += {sites!r}; exec(open('program.py').read())"]
    done = subprocess.run(
        [sys.executable, *interpreter, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
