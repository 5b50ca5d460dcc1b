import numpy as np
import pytest
from gan_reference import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.core.errors import UsageError
from weightsmith.search.selection import cars, crowding, nsga2, ranks


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", ["nds2", "nds3", "nsga2"])
def test_ranks_are_those_of_the_reference(name):
    assert ranks(GOLDEN[f"{name}.F"].numpy()).tolist() == GOLDEN[f"{name}.rank"].tolist()


def test_crowding_and_survivors_are_those_of_the_reference():
    F = GOLDEN["nsga2.F"].numpy()
    np.testing.assert_allclose(crowding(F), GOLDEN["nsga2.crowding"].numpy(), rtol=0, atol=1e-12)
    for seed in range(5):
        assert sorted(nsga2(F, 12, rng(seed))) == GOLDEN["nsga2.survivors_sorted"].tolist()


def test_the_released_selection_keeps_what_the_reference_keeps():
    columns = [GOLDEN[f"cars.{name}"].numpy() for name in ("is", "fid", "size")]
    kept = [cars(*columns, 12, rng(seed)) for seed in range(200)]
    assert all(len(set(one)) == 12 for one in kept)
    always = set.intersection(*map(set, kept))
    assert sorted(always) == sorted(GOLDEN["cars.always"].tolist())
    sometimes = set.union(*map(set, kept)) - always
    assert sorted(sometimes) == sorted(GOLDEN["cars.sometimes"].tolist())


def test_a_row_that_is_not_finite_leaves_the_other_ranks_alone():
    F = np.array([[1.0, 4.0], [2.0, 3.0], [3.0, 5.0], [4.0, 1.0]])
    for bad in (np.nan, np.inf, -np.inf):
        found = ranks(np.vstack([F, [bad, 0.0]]))
        assert found.tolist() == [*ranks(F), ranks(F).max() + 1]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_rank_zero_is_what_nobody_dominates(rows):
    F = np.array(rows, dtype=float)
    dominated = [any((one >= G).all() and (one > G).any() for G in F) for one in F]
    assert (ranks(F) == 0).tolist() == [not bad for bad in dominated]


@given(st.integers(1, 24), st.integers(0, 9))
def test_survivors_never_rank_behind_the_dropped(keep, seed):
    F = GOLDEN["nsga2.F"].numpy()
    kept, rank = nsga2(F, keep, rng(seed)), ranks(F)
    assert len(set(kept)) == keep
    dropped = set(range(len(F))) - set(kept)
    assert max(rank[list(kept)]) <= min((rank[index] for index in dropped), default=99)


def test_no_individuals_are_refused():
    for bad in ([], [[]], [1.0, 2.0]):
        with pytest.raises(UsageError, match="objectives must be"):
            ranks(bad)
