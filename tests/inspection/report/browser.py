"""A real, headless Chromium over pages that lie here as files; without one, the tests that need it are skipped."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    """One tab for all tests of a module: a new one for each would take longer than most of them."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, of the dev extra, is not installed")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to start as root, as in most containers; the pages are our own.
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = started.new_page(permissions=["clipboard-read", "clipboard-write"])
        page.set_default_timeout(10_000)
        yield page
        started.close()


@pytest.fixture
def visit(tab: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """visit(html, hash, width, scheme): the page, loaded; at the end it must have fetched nothing and met no error."""
    asked, said, visited = [], [], []
    listeners = {
        "request": lambda request: asked.append(request.url),
        "console": lambda message: said.append(message.text) if message.type == "error" else None,
        "pageerror": lambda error: said.append(str(error)),
    }

    def load(html: str, fragment: str = "", *, width: int = 1400, scheme: str = "light") -> Any:
        file = tmp_path / f"page-{len(visited)}.html"
        file.write_text(html, encoding="utf-8")
        visited.append(file.as_uri())
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(file.as_uri() + fragment)
        tab.wait_for_selector("html[data-ready]")
        return tab

    for event, listener in listeners.items():
        tab.on(event, listener)
    yield load
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert {url.split("#")[0] for url in asked if not url.startswith("data:")} == set(visited)
    assert said == []
