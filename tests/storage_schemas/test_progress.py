"""Numbers for people: nouns agree with their numbers, wherever the program prints both."""

import ast
import re

import pytest

from secondcast.storage_schemas.progress import counted
from tests.project.test_imports import MODULES

PLURAL = re.compile(
    r" (?:(?:distinct|held-out|committed|film|sampling|whole|embedding) )?(?:samples|shards|prompts|trajectories|"
    r"images|pictures|problems|captions|workers|processes|caches|duplicates|steps|strips)\b"
)
# Several numbers, a name, a rate, or a number that is never one.
ALLOWED = (
    "' and '.join(map(str, lengths))", "stage.name", "build['trajectories_per_hour']", "build['workers']",
    "processes.ranks", "ranks", "most", "len(found)",
    "stage.batch_size / whole",
)  # fmt: skip


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "shard", "1 shard"),
        (0, "shard", "0 shards"),
        (2, "held-out trajectory", "2 held-out trajectories"),
        (12_345, "prompt", "12,345 prompts"),
        (3, "batch", "3 batches"),
        (2, "process", "2 processes"),
        (2, "day", "2 days"),
        (1, "trajectory", "1 trajectory"),
    ],
)
def test_a_noun_agrees_with_its_number(count, noun, text):
    assert counted(count, noun) == text


def test_no_message_puts_a_plural_behind_a_number_that_may_be_one():
    # Of "3 of {n} shards" the plural is right for any n; a text length, a size or a limit is never one.
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, value, after in zip([None, *node.values], node.values, [*node.values[1:], None], strict=False):
                if not (isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)):
                    continue
                text = str(before.value) if isinstance(before, ast.Constant) else ""
                if PLURAL.match(str(after.value)) and not re.search(r"\bof (the |its |all )?$|\bor $|to $", text):
                    assert ast.unparse(value.value) in ALLOWED, f"{file}:{node.lineno}: {ast.unparse(node)}"
