"""Measures between two moments, and what they say where there is nothing to compare."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.diagnose import (
    effective_rank,
    kernel_alignment,
    kernel_target_alignment,
    representation_alignment,
    sign_similarity,
    weight_change,
)


def matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_alignments_are_cosines_that_scale_does_not_change(samples, units, other, seed, scale):
    h0, h1 = matrix(seed, samples, units), matrix(seed + 1, samples, other)
    k0, k1 = h0 @ h0.T, h1 @ h1.T
    value = kernel_alignment(k0, k1)
    assert -1e-12 <= value <= 1 + 1e-12
    assert kernel_alignment(scale * k0, k1) == pytest.approx(value, abs=1e-9)
    assert representation_alignment(scale * h0, h1) == pytest.approx(value, abs=1e-9)
    assert kernel_alignment(k0, k0) == pytest.approx(1, abs=1e-12)
    h0, h1 = h0 + 3, h1 - 5
    if samples > 1:
        centered = representation_alignment(h0, h1, centered=True)
        moved = representation_alignment(h0 + 7, h1, centered=True)
        assert moved == pytest.approx(centered, abs=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "why"), [(0, 1, "before or after"), (1, 0, "before or after"), (0, 0, "before and after")]
)
def test_a_silent_layer_is_nan_with_its_name(before, after, why):
    k = torch.ones(3, 3)
    with pytest.warns(WeightsmithWarning, match=f"the alignment of layer 3 is NaN: it is zero {why}"):
        assert math.isnan(kernel_alignment(before * k, after * k, what="layer 3"))
    with pytest.warns(WeightsmithWarning, match="layer 3"):
        assert math.isnan(representation_alignment(before * k, after * k, what="layer 3"))


def test_what_has_diverged_is_nan_and_no_crash():
    bad = torch.full((3, 3), math.nan)
    with pytest.warns(WeightsmithWarning, match="not finite"):
        assert math.isnan(kernel_alignment(bad, torch.ones(3, 3)))
    with pytest.warns(WeightsmithWarning, match="not finite"):
        assert math.isnan(representation_alignment(torch.ones(3, 2), torch.full((3, 2), math.inf)))
    assert math.isnan(sign_similarity(bad, bad))
    assert math.isnan(weight_change(torch.ones(3, 3), bad))
    assert math.isnan(effective_rank(bad, "stable"))
    assert math.isnan(effective_rank(bad))


def test_weight_changes_of_one_and_of_many():
    w0, w1 = (
        {"a": torch.zeros(2), "b": torch.full((4,), 2.0)},
        {"a": torch.tensor([3.0, 0]), "b": torch.tensor([2.0, 2, 2, 6])},
    )
    assert weight_change(w0, w1) == pytest.approx(5)
    assert weight_change(w0, w1, relative=True) == pytest.approx(5 / 4)
    assert weight_change(w0["b"], w0["b"]) == 0
    assert math.isnan(weight_change(w0["a"], w1["a"], relative=True))


def test_signs_count_silent_units_as_equal():
    assert sign_similarity(torch.tensor([1.0, 0, -1, 2]), torch.tensor([5.0, 0, 1, 0])) == 0.5


def test_a_kernel_that_is_the_targets_is_aligned_with_them():
    y = matrix(0, 4, 2)
    k = torch.outer(y.flatten(), y.flatten())
    assert kernel_target_alignment(k, y) == pytest.approx(1)
    assert kernel_target_alignment(k, y, by="trace") == pytest.approx(1)
    assert kernel_target_alignment(torch.eye(8), y, by="trace") == pytest.approx(1 / 8)
    with pytest.warns(WeightsmithWarning, match="NaN"):
        assert math.isnan(kernel_target_alignment(k, 0 * y))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 50), st.floats(1e-30, 1e30))
@settings(max_examples=40, deadline=None)
def test_effective_ranks_lie_between_1_and_the_rank(rows, columns, seed, scale):
    w = matrix(seed, rows, columns)
    for kind in ("stable", "nuclear", "participation", "participation_s", "entropy", "numerical"):
        found = effective_rank(w, kind)
        assert 1 - 1e-9 <= found <= min(rows, columns) + 1e-9
        assert effective_rank(w * scale, kind) == pytest.approx(found, rel=1e-6)
    if rows == columns:
        assert 0 < effective_rank(w) <= 1 + 1e-9


def test_effective_ranks_of_known_matrices():
    w = torch.diag(torch.tensor([2.0, -1, 1, 0]))
    assert effective_rank(w) == pytest.approx(4 / 2 / 4)
    assert effective_rank(w, "eig_sum") == pytest.approx(2)
    assert effective_rank(w, "numerical") == 3
    assert effective_rank(torch.tensor([[0.0, 1], [-1, 0]])) == pytest.approx(1)  # eigenvalues i and -i
    assert effective_rank(torch.zeros(3, 3)) == effective_rank(torch.zeros(3, 2), "entropy") == 0
    assert effective_rank(torch.zeros(2, 2), "numerical") == 0
    stack = torch.stack([torch.eye(3), torch.zeros(3, 3), torch.ones(3, 3)])
    assert effective_rank(stack, "stable", batch_dims=1).tolist() == pytest.approx([3, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_rank(torch.ones(2, 3)), "needs a square matrix"),
        (lambda: effective_rank(torch.ones(3)), "two dimensions"),
        (lambda: effective_rank(torch.ones(3, 3), "spectral"), "kind 'spectral' is not known"),
        (lambda: effective_rank(torch.ones(3, 3), "numerical", tol=2), "tol must be"),
        (lambda: effective_rank(torch.ones(0, 3), "stable"), "elements"),
        (lambda: kernel_alignment(torch.ones(2, 2), torch.ones(3, 3)), "must have the shape"),
        (lambda: representation_alignment(torch.ones(2, 2), torch.ones(3, 2)), "same samples"),
        (lambda: weight_change({"a": torch.ones(1)}, {"b": torch.ones(1)}), "a, b"),
        (lambda: kernel_target_alignment(torch.ones(2, 2), torch.ones(3)), "one number per row"),
        (lambda: kernel_target_alignment(torch.ones(2, 2), torch.ones(2), by="sum"), "by must be"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_integers_have_no_effective_rank():
    with pytest.raises(TypeError, match="floating-point"):
        effective_rank(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("units", [3, 9])
def test_complex_activity_has_one_alignment_whichever_way_it_is_computed(units):
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(5, units, generator=generator, dtype=torch.complex128) for _ in range(2))
    r0, r1 = before @ before.mH, after @ after.mH
    expected = (torch.vdot(r0.flatten(), r1.flatten()).real / (r0.norm() * r1.norm())).item()
    assert representation_alignment(before, after) == pytest.approx(expected)
