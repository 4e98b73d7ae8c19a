"""Problems of config models are one line: where, what was found and what was expected."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import first_problem


class Inner(Record):
    size: int = Field(default=1, ge=1)


class Sample(Record):
    name: str
    rate: float = Field(default=0.5, gt=0, lt=1)
    most: int = Field(default=1, le=9)
    kind: Literal["a", "b"] = "a"
    on: bool = False
    inner: tuple[Inner, ...] = ()
    table: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self):
        if self.on and self.kind == "b":
            raise ValueError("on needs kind a")
        return self


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "name is missing"),
        ({"name": 3}, "name is 3, expected text"),
        ({"name": "x", "rate": 0}, "rate is 0, expected more than 0"),
        ({"name": "x", "rate": 1}, "rate is 1, expected less than 1"),
        ({"name": "x", "rate": float("inf")}, "rate is inf, expected a finite number"),
        ({"name": "x", "rate": "fast"}, "rate is 'fast', expected a number"),
        ({"name": "x", "most": 10}, "most is 10, expected at most 9"),
        ({"name": "x", "most": "ten"}, "most is 'ten', expected an integer"),
        ({"name": "x", "most": 1.5}, "most is 1.5, expected an integer"),
        ({"name": "x", "kind": "c"}, "kind is 'c', expected 'a' or 'b'"),
        ({"name": "x", "on": "perhaps"}, "on is 'perhaps', expected true or false"),
        ({"name": "x", "inner": [{"size": 0}]}, "inner.0.size is 0, expected at least 1"),
        ({"name": "x", "inner": 3}, "inner is 3, expected a list"),
        ({"name": "x", "table": 3}, "table is 3, expected a table of names and values"),
        ({"name": "x", "colour": 1}, "colour is an unknown key (its value is 1)"),
        ({"name": "x", "on": True, "kind": "b"}, "settings: on needs kind a"),
    ],
)
def test_a_problem_says_where_what_was_found_and_what_was_expected(values, problem):
    with pytest.raises(ValidationError) as caught:
        Sample.model_validate(values)
    assert first_problem(caught.value) == problem
