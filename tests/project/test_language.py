"""Texts use the field's terms: no help text, docstring, message or page has a word that the project has given up."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each with what is written instead. Whole words, in texts; names in code are not looked at.
BANNED = {
    "mend": "repair",
    "mended": "repaired",
    "mends": "repairs",
    "anew": "again",
    "goes on": "continues, resumes",
    "going on": "continuing, resuming",
    "go on": "continue, resume",
    "told": "reported",
    "tells": "reports",
    "says": "reports, prints",
    "said": "reported, printed",
    "vouch": "prove",
    "vouches": "proves",
    "way out": "fix",
    "put right": "repair",
    "shall": "(drop)",
    "reckon": "compute",
    "reckoned": "computed",
    "hindrance": "obstacle",
    "leave away": "leave out",
    "so many": "(a number)",
    "of ours": "our",
    "replica": "sample",
    "replicas": "samples",
    "replay floor": "replay error",
    "crew": "workers",
    "law 1": "invariant 1",
    "law 2": "invariant 2",
    "law 3": "invariant 3",
}
PATTERN = re.compile(rf"\b({'|'.join(re.escape(word) for word in BANNED)})\b", re.IGNORECASE)
PACKAGES = ("api", "cache_builder", "commands", "evaluation", "inspection", "models", "storage_schemas", "trainer")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/building.md", "docs/evaluation.md", "docs/inspecting.md",
         "docs/options.md", "docs/python.md", "docs/sharing.md", "docs/small-gpus.md", "docs/training.md",
         "integrations/comfyui/README.md")  # fmt: skip


def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", *(f"{package}/*.py" for package in PACKAGES), "cli.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Data: words of English captions.
    data = {"cache_builder/prompts/commontext.py", "evaluation/image_metrics/phrases.py"}
    return [file for file in listed.stdout.split() if file not in data]


def texts(source: str) -> list[tuple[int, str]]:
    """String literals with more than one word: docstrings, help texts and messages."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            found.append((node.lineno, node.value))
    return found


def banned(text: str) -> list[str]:
    return [f"{match[0]!r} (write: {BANNED[match[0].lower()]})" for match in PATTERN.finditer(text)]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_no_text_of_the_code_uses_a_word_that_was_given_up():
    wrong = [
        f"{file}:{line}: {word}"
        for file in sources()
        for line, text in texts((ROOT / file).read_text())
        for word in banned(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_uses_a_word_that_was_given_up(page):
    lines = enumerate((ROOT / page).read_text().splitlines(), start=1)
    wrong = [f"{page}:{number}: {word}" for number, line in lines for word in banned(line)]
    assert not wrong, "\n".join(wrong)


def test_a_word_is_found_as_a_whole_and_in_any_case():
    assert banned("It Goes on.") == ["'Goes on' (write: continues, resumes)"]
    assert banned("a recommended amendment") == []
