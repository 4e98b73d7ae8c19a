"""The search swaps single parts, keeps the best, and evaluates each choice once, at most as often as allowed."""

from secondcast.models.student.initial.cut import layer_starts
from secondcast.models.student.initial.search import best_by_swaps


def swaps(kept):
    return [(old, new) for old in kept for new in range(6) if new not in kept]


def test_swaps_find_the_best_of_an_additive_error_and_evaluate_nothing_twice():
    seen = []

    def error(parts):
        seen.append(parts)
        return -sum(part * part for part in parts)

    assert best_by_swaps([(0, 1, 2)], swaps, error, evaluations=50) == (3, 4, 5)
    assert len(seen) == len(set(seen)) <= 20


def test_the_number_of_evaluations_is_bounded():
    seen = []
    best_by_swaps([(0, 1, 2)], swaps, lambda parts: seen.append(parts) or -sum(parts), evaluations=4)
    assert len(seen) == 4


def test_the_best_of_the_starts_is_kept_without_swaps():
    assert best_by_swaps([(0, 1), (0, 5), (0, 3)], lambda kept: (), lambda parts: -parts[1], evaluations=9) == (0, 5)


def test_the_first_layer_is_in_every_start():
    assert layer_starts(3, 24) == [(0, 1, 2), (0, 1, 23), (0, 12, 23)]
    assert layer_starts(1, 4) == [(0,)] and layer_starts(4, 4) == [(0, 1, 2, 3)]
