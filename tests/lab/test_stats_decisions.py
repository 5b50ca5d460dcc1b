import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.lab.stats.decisions import IRRELEVANT, REFUTED, SUPPORTED, UNDECIDED, Evidence, decide, holm

p_values = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8).map(np.array)


def decisions(threshold, side, worth, plain=True):
    columns = [np.atleast_1d(np.array(column, dtype=float)) for column in (threshold, side, worth)]
    return decide(Evidence(*columns, np.full(len(columns[0]), plain)))[0].tolist()


@given(p_values)
def test_holm_never_makes_a_p_value_smaller_and_keeps_their_order(p):
    adjusted, _ = holm(p)
    assert np.all((p <= adjusted) & (adjusted <= 1))
    assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0)


@given(p_values, st.integers(0, 7))
def test_holm_is_monotone_in_each_p_value(p, index):
    smaller = p.copy()
    smaller[index % len(p)] /= 2
    assert np.all(holm(smaller)[0] <= holm(p)[0])


@given(p_values)
def test_a_claim_passes_holm_exactly_when_its_p_value_passes_its_level(p):
    adjusted, levels = holm(p)
    assert np.array_equal(adjusted <= 0.05, p <= levels)


def test_holm_gives_the_textbook_values():
    adjusted, levels = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])


def test_families_are_corrected_apart_from_each_other():
    stack = np.array([[0.01, 0.5], [0.03, 0.02]])
    assert np.array_equal(holm(stack)[0], np.stack([holm(row)[0] for row in stack]))


@pytest.mark.parametrize(
    ("threshold", "side", "worth", "expected"),
    [
        (0.01, 1, 1, SUPPORTED),
        (0.01, -1, 1, REFUTED),
        (0.3, 1, 0.01, IRRELEVANT),
        (0.3, 1, 0.2, UNDECIDED),
        (0.01, 1, 0.01, IRRELEVANT),
    ],
)
def test_the_verdict_follows_from_the_two_tests(threshold, side, worth, expected):
    assert decisions(threshold, side, worth) == [expected]


def test_a_claim_with_a_margin_is_decided_by_its_margin_first():
    assert decisions(0.01, 1, 0.01, plain=False) == [SUPPORTED]
    assert decisions(0.3, 1, 0.01, plain=False) == [IRRELEVANT]


def test_the_rest_of_the_family_counts():
    assert decisions(0.04, 1, 1) == [SUPPORTED]
    assert decisions([0.04, 1], [1, 0], [1, 1]) == [UNDECIDED, UNDECIDED]
    assert decisions([0.04, 0.01], [1, 1], [1, 1]) == [SUPPORTED, SUPPORTED]
