"""Wilson's interval, against figures computed by hand and published tables; runs on the same captions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.evaluation.intervals import bootstrap, clustered, wilson


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


@pytest.mark.thorough
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30), st.integers(1, 4))
def test_runs_that_answer_alike_are_no_surer_than_one(values, runs):
    expected = bootstrap(values) if len(set(values)) > 1 else wilson(values[0], len(values))
    assert clustered([values] * runs) == pytest.approx(expected, abs=1e-12)


def test_runs_that_err_on_captions_of_their_own_are_surer_than_one_and_not_than_all_captions():
    captions_RN = np.random.default_rng(0).random((4, 200)) < 0.7
    (low, high), (one_low, one_high) = clustered(captions_RN.astype(float)), clustered(captions_RN[:1].astype(float))
    pooled_low, pooled_high = wilson(captions_RN.mean(), captions_RN.size)
    assert high - low < 0.6 * (one_high - one_low)
    assert high - low == pytest.approx(pooled_high - pooled_low, rel=0.15)


def test_runs_that_are_all_right_are_as_sure_as_their_captions_allow():
    assert clustered([[1.0] * 192] * 5) == wilson(1.0, 192)
    assert clustered([[0.5], [1.0]]) == wilson(0.75, 1)
