"""The page of `inspect report` as text: it holds its data as given, and nothing that leads out of it."""

import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secondcast.inspection.report.page import RUN_SCRIPTS, SCRIPTS, json_in_html, render
from tests.inspection.report.report_data import HOSTILE, hostile_data, report_data

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "inspection" / "page"


class Scripts(HTMLParser):
    """The elements of a page that hold scripts or style, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[dict, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "style"):
            self.found.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.cdata_elem and self.found:
            attributes, text = self.found[-1]
            self.found[-1] = (attributes, text + data)


@pytest.fixture(scope="module")
def html():
    return render(report_data())


def test_the_data_is_in_the_page_as_it_was_given():
    scripts = Scripts(render(hostile_data())).found
    assert [attributes for attributes, _ in scripts] == [
        {}, {"type": "application/json", "id": "data"}, {"type": "module"},
    ]  # fmt: skip
    assert json.loads(scripts[1][1]) == hostile_data()


def test_no_text_ends_the_script_early_and_every_text_is_utf_8():
    html = render(hostile_data())
    assert html.encode() and "&lt;b&gt;mine" in html and "\\u003c/script>\\u003cscript>" in html
    assert json_in_html([HOSTILE]).count("<") == 0


def test_numbers_that_are_not_finite_become_null():
    assert (
        json_in_html({"a": [1.5, float("nan")], "b": (float("inf"), "NaN", None)})
        == '{"a":[1.5,null],"b":[null,"NaN",null]}'
    )


def test_the_page_holds_everything_and_links_to_nothing(html):
    assert not re.search(r"""(src|href)=(?!"(#|data:))""", html.split("<script")[0])
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert not re.search(r"{{\w+}}|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "eval(" not in html


def test_every_file_of_the_page_is_packaged_and_used():
    assert {file.name for file in PAGE.glob("*.js")} == {*SCRIPTS, *RUN_SCRIPTS}
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "secondcast.inspection"
    ]
    assert {file.relative_to(PAGE.parent) for file in PAGE.iterdir()} == {
        file.relative_to(PAGE.parent) for pattern in packaged for file in PAGE.parent.glob(pattern)
    }


@pytest.mark.parametrize(("page", "scripts"), [("report", SCRIPTS), ("run", RUN_SCRIPTS)])
def test_every_script_of_a_page_is_checked_by_typescript(page, scripts):
    folder = ROOT / ".ci/javascript"
    files = json.loads((folder / f"{page}.json").read_text())["files"]
    assert [(folder / file).resolve() for file in files] == [PAGE / name for name in scripts]


def test_the_page_is_made_without_torch_and_numpy():
    code = "import sys, secondcast.inspection.report.page; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
