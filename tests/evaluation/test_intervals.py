"""Wilson's interval, against figures computed by hand from its formula and published tables."""

import pytest

from evaluation.intervals import wilson


def test_known_intervals():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(successes / count, count)
        assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_all_right_is_not_certainty():
    assert wilson(1.0, 192) == (pytest.approx(0.980385, abs=1e-4), 1.0)


def test_a_rate_outside_is_refused():
    with pytest.raises(ValueError, match="rate 1.2 of 3 trials"):
        wilson(1.2, 3)
