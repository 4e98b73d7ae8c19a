"""Problems that pydantic found, in the words of this project: what was found and what was expected."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

# Floats from here on are shown with an exponent.
_LONG = 1e16
# By pydantic's type of error, with the names of its context.
_EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "literal_error": "{expected}",
    "dict_type": "a table of names and values",
    "model_type": "a table of names and values",
    "list_type": "a list",
    "tuple_type": "a list",
}


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic ValidationError, in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if not where:
        # A problem between fields: the message names them, and the input would be all of them.
        return f"settings: {problem['msg'].removeprefix('Value error, ')}"
    return problem_text(where, problem)


def newer_problem(where: str, error: ValidationError) -> str | None:
    """An error for a record that is intact by its digest, but has a key or a choice that this version lacks; else None.

    Damage does not leave a digest right, so only another version can have written it.
    """
    for problem in error.errors():
        if problem["type"] in ("extra_forbidden", "literal_error"):
            field = ".".join(str(part) for part in problem["loc"])
            return (
                f"{where} is intact, but {problem_text(field, problem)}: a newer version of secondcast wrote it; "
                f"upgrade secondcast, here and on every machine that uses the cache"
            )
    return None


def problem_text(where: str, problem: Mapping[str, Any]) -> str:
    """A problem of pydantic's `errors()` at a field or flag, such as "--steps is 0, expected at least 1"."""
    kind, found = problem["type"], repr(problem["input"])
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"{where} is an unknown key (its value is {found})"
    if (expected := _EXPECTED.get(kind)) is not None:
        bounds = {name: _number(value) for name, value in problem.get("ctx", {}).items()}
        return f"{where} is {found}, expected {expected.format(**bounds)}"
    message = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    stated = re.search(rf"(?<!\w){re.escape(found)}(?!\w)", message)
    return f"{where}: {message}" + ("" if stated else f" (found {found})")


def _number(value: Any) -> Any:
    """A bound as people write it: 1 for 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() and value < _LONG else value
