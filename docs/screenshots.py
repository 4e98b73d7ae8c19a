"""Make the pictures of docs/inspecting.md from what `make demo` left: `.venv/bin/python docs/screenshots.py demo`.

Needs Debian's chromium and playwright (the dev extra). Terminal views are what the command prints in a terminal of 100
columns; the report is clicked through as a person would.
"""

import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parent
COLUMNS = 100
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TERMINAL = {
    "summary": "inspect summary {demo}/cache",
    "show": "inspect show {demo}/cache 12",
    "plan": "plan build --teacher FLUX.1-dev --num-prompts 50000 --gpu h100",
}


def terminal_text(words: list[str]) -> str:
    """What a command prints in a terminal, colours included."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    command = [str(Path(sys.executable).parent / "secondcast"), *words]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            # The other end is closed.
            break
        if not part:
            break
        parts.append(part)
    if process.wait():
        raise SystemExit(f"`secondcast {' '.join(words)}` ended with {process.returncode}")
    return b"".join(parts).decode().replace("\r\n", "\n").rstrip()


def terminal_svg(words: list[str]) -> str:
    text = terminal_text(words)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ secondcast {' '.join(words)}", style="bold"))
    console.print(Text.from_ansi(text))
    # The last line's descenders are cut otherwise.
    console.print()
    return console.export_svg(title="secondcast")


def shoot_terminal(page: Any, name: str, words: list[str]) -> None:
    page.set_content(f"<body style='margin:0'>{terminal_svg(words)}</body>")
    page.locator("svg").first.screenshot(path=DOCS / f"terminal-{name}.png")


def shoot_report(page: Any, report: Path, scheme: str) -> None:
    """The pictures, and step 5 of the first prompt with a film strip; then where the student fails."""
    page.emulate_media(color_scheme=scheme)
    page.goto(report.absolute().as_uri() + "#step=5")
    page.wait_for_selector("html[data-ready]")
    page.screenshot(path=DOCS / f"report-{scheme}.png")
    if scheme == "light":
        # As tall as the page: nothing is scrolled under what sticks to the top.
        page.set_viewport_size({"width": 1440, "height": 4000})
        page.locator("#students").screenshot(path=DOCS / "report-students.png")
        page.set_viewport_size({"width": 1440, "height": 900})


def main() -> None:
    demo = Path(sys.argv[1])
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is on the PATH: install Debian's chromium")
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to start as root; the pages are our own.
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(viewport={"width": 1440, "height": 900})
        for name, words in TERMINAL.items():
            shoot_terminal(page, name, words.format(demo=demo).split())
        for scheme in ("light", "dark"):
            shoot_report(page, demo / "report.html", scheme)
        started.close()


if __name__ == "__main__":
    main()
