"""Run commands in a process of their own, one after another: as another user, or with a limit on the size of files.

`python -m tests.commands.running` reads JSON from stdin: {"user": number or null, "before": [...], "commands":
[{"words": [...], "limit": bytes or null}]}; it prints JSON: [{"code": ..., "said": ..., "heard": ...}]. Imports are
paid once for all commands. Those of `before` run as the user who started it: what they import, another user may not be
able to read.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_commands(
    commands: list[dict[str, Any]], *, home: Path, user: int | None = None, before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Exit code, stdout and stderr of each command; those of `before` must succeed. home: a folder to write to."""
    environment = os.environ | {
        "HOME": str(home), "SECONDCAST_CACHE_HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(home / "mpl"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    asked = json.dumps({"user": user, "before": [*before], "commands": commands})
    done = subprocess.run(
        [sys.executable, "-m", "tests.commands.running"], input=asked,
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _run(words: list[str], limit: int | None) -> dict[str, Any]:
    from secondcast import cli
    from tests.commands.limits import no_file_above

    said, heard, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["secondcast", *words]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(heard):
        try:
            with no_file_above(limit) if limit is not None else contextlib.nullcontext():
                cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            heard.write(f"Traceback of {type(error).__name__}: {error}")
    return {"words": words, "code": code, "said": said.getvalue(), "heard": heard.getvalue()}


def main() -> None:
    asked = json.loads(sys.stdin.read())
    answers = sys.stdout
    sys.stdout = sys.stderr
    for command in asked["before"]:
        found = _run(command["words"], command["limit"])
        assert found["code"] == 0, found
    if asked["user"] is not None:
        os.setgid(asked["user"])
        os.setuid(asked["user"])
    found = [_run(command["words"], command["limit"]) for command in asked["commands"]]
    answers.write(json.dumps(found))


if __name__ == "__main__":
    main()
