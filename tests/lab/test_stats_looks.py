import pytest

from weightsmith.core.errors import UsageError
from weightsmith.lab.stats import Plan, next_look


def test_the_looks_are_at_3_5_10_and_20_seeds():
    assert [next_look(n) for n in (0, 3, 4, 5, 10, 19, 20)] == [3, 5, 5, 10, 20, 20, None]


def test_the_first_look_spends_little_and_the_shares_add_up_to_little_more_than_1():
    shares = Plan().shares
    assert shares[0] <= 0.1 * sum(shares)
    assert 1 <= sum(shares) <= 1.2


def test_one_look_spends_the_whole_level():
    assert Plan((7,)).shares == (1.0,)


def test_the_first_looks_of_the_calibrated_ones_keep_their_shares():
    assert Plan((3, 5)).shares == Plan().shares[:2]


def test_looks_without_calibration_share_the_level():
    assert Plan((4, 8)).shares == (0.5, 0.5)


@pytest.mark.parametrize(("seeds", "look"), [(0, None), (2, None), (3, 3), (9, 5), (25, 20)])
def test_seeds_between_two_looks_count_for_the_look_before(seeds, look):
    assert Plan().reached(seeds) == look


@pytest.mark.parametrize("looks", [(), (0,), (5, 3), (3, 3)])
def test_looks_that_are_not_ascending_are_refused(looks):
    with pytest.raises(UsageError, match="ascending"):
        Plan(looks)
