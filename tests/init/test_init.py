"""Ranks, norms, structures, and what they are asked to fill."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith import init
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.diagnose import effective_rank

SIZES = st.integers(1, 12)
VERBS = {
    "low_rank_": lambda w, **more: init.low_rank_(w, 2, **more),
    "soft_rank_": lambda w, **more: init.soft_rank_(w, 2.5, **more),
    "dale_": lambda w, **more: init.dale_(w, **more),
    "block_": lambda w, **more: init.block_(w, [3, 5], [[1, -1], [0, 2]], 0.5, **more),
    "chain_": lambda w, **more: init.chain_(w, -0.1, 0.2, 0.3, **more),
    "from_matrix_": lambda w, **more: init.from_matrix_(w, torch.arange(100.0).reshape(10, 10).sin(), **more),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(SIZES, SIZES, st.integers(1, 12), st.sampled_from(["frobenius", "spectral", "none"]))
@settings(max_examples=60, deadline=None)
def test_the_rank_is_the_wanted_one_and_the_norm_is_kept(rows, columns, rank, norm):
    rank = min(rank, rows, columns)
    full = init.low_rank_(torch.empty(rows, columns, dtype=torch.float64), min(rows, columns), generator=seeded())
    w = init.low_rank_(torch.empty_like(full), rank, norm=norm, generator=seeded())
    assert torch.linalg.matrix_rank(w) == rank
    order = {"frobenius": "fro", "spectral": 2, "none": 2}[norm]
    assert torch.linalg.matrix_norm(w, order) == pytest.approx(torch.linalg.matrix_norm(full, order).item())


@given(
    SIZES, SIZES, st.floats(0, 1), st.sampled_from(["stable", "nuclear", "participation", "participation_s", "entropy"])
)
@settings(max_examples=60, deadline=None)
def test_a_soft_rank_is_the_wanted_one(rows, columns, share, kind):
    target = 1 + share * (min(rows, columns) - 1)
    w = init.soft_rank_(torch.empty(rows, columns, dtype=torch.float64), target, kind, generator=seeded())
    assert effective_rank(w, kind) == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_all_structures_have_the_norm_of_the_same_random_matrix(verb):
    norms = [float(torch.linalg.matrix_norm(other(torch.empty(8, 8), generator=seeded()))) for other in VERBS.values()]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)
    assert float(torch.linalg.matrix_norm(verb(torch.empty(8, 8), norm="spectral", generator=seeded()), 2)) == (
        pytest.approx(float(torch.linalg.matrix_norm(init.low_rank_(torch.empty(8, 8), 8, generator=seeded()), 2)))
    )


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_flags_and_layout_stay(verb, dtype):
    w = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype).T, requires_grad=False)
    storage = w.data_ptr()
    returned = verb(w, generator=seeded())
    assert returned is w
    assert (w.dtype, w.data_ptr(), w.stride(), w.requires_grad) == (dtype, storage, (1, 8), False)
    reference = verb(torch.zeros(8, 8, dtype=torch.float64), generator=seeded())
    torch.testing.assert_close(w.double(), reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_global_generator_is_used_without_one(verb):
    torch.manual_seed(3)
    first = verb(torch.empty(8, 8)).clone()
    torch.manual_seed(3)
    assert torch.equal(first, verb(torch.empty(8, 8)))
    state = torch.get_rng_state()
    verb(torch.empty(8, 8), generator=seeded())
    assert torch.equal(state, torch.get_rng_state())


@given(st.integers(2, 30), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_units_keep_to_one_sign(units, share):
    excitatory = round(share * units)
    balanced = 0 < excitatory < units
    w = init.dale_(torch.empty(units, units), share, balanced, generator=seeded())
    assert (w[:, :excitatory] >= 0).all()
    assert (w[:, excitatory:] <= 0).all()
    assert not math.isnan(w.sum())


def test_balanced_rows_sum_to_zero_on_average():
    w = init.dale_(torch.empty(400, 400), generator=seeded())
    assert abs(w.sum(1).mean()) < 0.1 * w.abs().sum(1).mean()


def test_blocks_have_their_means_target_type_first():
    w = init.block_(torch.empty(50, 50), [20, 30], [[1, -2], [3, 0]], 0.0, norm="none")
    assert torch.allclose(w[:20, :20], torch.tensor(1 / 50**0.5))
    assert torch.allclose(w[:20, 20:], torch.tensor(-2 / 50**0.5))
    assert torch.allclose(w[20:, :20], torch.tensor(3 / 50**0.5))
    assert not w[20:, 20:].any()


def test_chains_and_shared_ends_are_as_asked():
    units, gain = 60, 2.0
    chain, conv, div = 0.2, 0.3, 0.4
    found = []
    for seed in range(150):
        w = init.chain_(
            torch.empty(units, units, dtype=torch.float64), chain, conv, div, gain=gain, norm="none",
            generator=seeded(seed),
        )  # fmt: skip
        w = w * units**0.5 / gain
        w.fill_diagonal_(0)
        pairs = (w @ w).fill_diagonal_(0).sum() / (units * (units - 1) * (units - 2))
        rows = (w.sum(1).square() - w.square().sum(1)).sum() / (units * (units - 1) * (units - 2))
        columns = (w.sum(0).square() - w.square().sum(0)).sum() / (units * (units - 1) * (units - 2))
        found.append(torch.stack([pairs, rows, columns]))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / len(found) ** 0.5
    assert ((mean - torch.tensor([chain, conv, div])).abs() < 4 * error).all()
    assert (error < 0.02).all()


def test_a_larger_connectome_loses_units_and_not_connections():
    measured = torch.arange(36.0).reshape(6, 6)
    w = init.from_matrix_(torch.empty(3, 3), measured.numpy(), norm="none", generator=seeded())
    kept = (w.diagonal() / 7).long()
    assert torch.equal(w, measured[kept][:, kept])
    assert torch.equal(init.from_matrix_(torch.empty(2, 6), measured[:2], norm="none"), measured[:2])


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2", None])
def test_a_rank_that_is_none_is_refused(rank):
    w = torch.ones(3, 3)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        init.low_rank_(w, rank)
    assert torch.equal(w, torch.ones(3, 3))


def test_a_rank_above_the_full_one_is_lowered_with_a_warning():
    with pytest.warns(WeightsmithWarning, match="rank 9 is lowered to 3"):
        w = init.low_rank_(torch.empty(3, 5), 9, generator=seeded())
    assert torch.equal(w, init.low_rank_(torch.empty(3, 5), np.int64(3), generator=seeded()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: init.low_rank_(w, 1, gain=0), "gain must be a number above 0"),
        (lambda w: init.low_rank_(w, 1, gain=math.nan), "gain must be"),
        (lambda w: init.low_rank_(w, 1, norm="fro"), "norm 'fro' is not known"),
        (lambda w: init.low_rank_(w, 1, base="uniform"), "base 'uniform' is not known"),
        (lambda w: init.low_rank_(w, 1, base=torch.zeros(4, 4)), "norm='frobenius' cannot be kept"),
        (lambda w: init.low_rank_(w, 1, base=torch.zeros(4, 4), norm="none"), "all zeros"),
        (lambda w: init.low_rank_(w, 1, base=torch.full((4, 4), math.nan)), "NaN or infinite"),
        (lambda w: init.low_rank_(w, 1, base=torch.ones(3, 3)), "base must have the shape"),
        (lambda w: init.soft_rank_(w, 0.9), "effective_rank must be between 1 and 4"),
        (lambda w: init.soft_rank_(w, 4.1), "effective_rank must be between 1 and 4"),
        (lambda w: init.soft_rank_(w, math.nan), "effective_rank must be"),
        (lambda w: init.soft_rank_(w, 2, "eig"), "kind 'eig' is not known"),
        (lambda w: init.dale_(w, 1.2), "frac_exc must be between 0 and 1"),
        (lambda w: init.dale_(w, 1.0), "balanced=True needs both"),
        (lambda w: init.block_(w, [2, 3], 0, 1), "sizes must be numbers above 0 with the sum 4"),
        (lambda w: init.block_(w, [2, 2], [1, 2], 1), r"mean must have shape \(2, 2\)"),
        (lambda w: init.block_(w, [2, 2], 0, -1), "std must be finite and at least 0"),
        (lambda w: init.block_(w, [2, 2], 0, 0), "cannot be kept"),
        (lambda w: init.chain_(w, 0.5, 0.2, 0.2), "chain must be between -0.2 and 0.2"),
        (lambda w: init.chain_(w, 0, 0.6, 0.6), "conv and div must be"),
        (lambda w: init.chain_(w, 0.1, 0, 0.6), "chain must be between"),
        (lambda w: init.from_matrix_(w, torch.ones(3, 9)), "matrix must be at least"),
        (lambda w: init.from_matrix_(w, torch.full((4, 4), math.inf)), "NaN or infinite"),
        (lambda w: init.from_matrix_(w, torch.zeros(4, 4)), "cannot be kept"),
        (lambda w: init.chain_(w[:2], 0, 0, 0), "needs a square matrix"),
        (lambda w: init.low_rank_(w[0], 1), "two dimensions at least"),
        (lambda w: init.low_rank_(w[0, 0], 1), "two dimensions at least"),
        (lambda w: init.low_rank_(w[:0], 1), "must have elements"),
        (lambda w: init.low_rank_(w.to("meta"), 1), "meta device"),
        (lambda w: init.low_rank_(w.half(), 1, gain=1e6), "does not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_nothing_changes(call, message):
    w = torch.ones(4, 4)
    with pytest.raises(UsageError, match=message):
        call(w)
    assert torch.equal(w, torch.ones(4, 4))


@pytest.mark.parametrize(
    "w", [torch.ones(3, 3, dtype=torch.int64), torch.eye(3).to_sparse(), torch.ones(3, 3).cfloat(), [1]]
)
def test_what_is_no_dense_float_tensor_is_a_type_error(w):
    with pytest.raises(TypeError, match="must be"):
        init.low_rank_(w, 1)
