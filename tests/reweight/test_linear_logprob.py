"""The fused head against the formula, in every precision, with bias, masks and ignored targets."""

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.reweight import fused_linear_logprob


def reference(hidden, weight, targets, bias=None, temperature=1.0):
    log_p = (nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    logp = log_p.gather(-1, targets[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy, (log_p.exp() ** 2 * (log_p + entropy[..., None])).sum(-1)


def case(n=(3, 5), d=4, v=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    return draw(*n, d), draw(v, d), torch.randint(v, n, generator=g), draw(v)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_values_and_gradients_are_those_of_the_formula(chunk_rows, temperature):
    hidden, weight, targets, bias = case()
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ours = fused_linear_logprob(
        hidden, weight, targets, bias=bias, temperature=temperature, chunk_rows=chunk_rows, return_second_moment=True,
        entropy_grad=True,
    )  # fmt: skip
    theirs = reference(hidden, weight, targets, bias, temperature)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    inputs = (hidden, weight, bias)
    for one, two in zip(
        torch.autograd.grad((a * ours[0] + b * ours[1]).sum(), inputs),
        torch.autograd.grad((a * theirs[0] + b * theirs[1]).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets, bias = case((3,), 3, 5)

    def run(*inputs):
        return fused_linear_logprob(*inputs[:2], targets, bias=inputs[2], chunk_rows=2, entropy_grad=True)[:2]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_entropy_and_second_moment_carry_no_gradient_unless_asked():
    hidden, weight, targets, _ = case()
    logp, entropy, second = fused_linear_logprob(hidden, weight, targets, return_second_moment=True)
    assert logp.requires_grad
    assert not entropy.requires_grad
    assert not second.requires_grad
    assert fused_linear_logprob(hidden, weight, targets)[2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_and_half_gradients(dtype):
    hidden, weight, targets, bias = case(dtype=dtype)
    logp, entropy, _ = fused_linear_logprob(hidden, weight, targets, bias=bias, chunk_rows=4, entropy_grad=True)
    expected = reference(hidden.double(), weight.double(), targets, bias.double())
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[0], rtol=0.05, atol=0.1)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == dtype
    (want,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), weight)
    torch.testing.assert_close(weight.grad.double(), want.double(), rtol=0.1, atol=0.2)


def test_it_works_under_autocast():
    hidden, weight, targets, _ = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _, _ = fused_linear_logprob(hidden.bfloat16(), weight, targets)
    torch.testing.assert_close(logp, reference(hidden, weight, targets)[0], rtol=0.05, atol=0.05)
    logp.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_masked_and_ignored_rows_are_zero_and_have_no_gradient():
    hidden, weight, targets, _ = case()
    mask = torch.ones(3, 5)
    mask[0] = 0
    ignored = targets.clone()
    ignored[1, 2] = -100
    with torch.no_grad():
        hidden[0] = float("nan")
    logp, entropy, _ = fused_linear_logprob(hidden, weight, ignored, mask=mask)
    assert (logp[0] == 0).all()
    assert logp[1, 2] == entropy[1, 2] == 0
    logp.sum().backward()
    assert (hidden.grad[0] == 0).all()
    assert (hidden.grad[1, 2] == 0).all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("n", [(0,), (2, 0)])
def test_no_rows_at_all(n):
    hidden, weight, targets, _ = case(n)
    logp, _, _ = fused_linear_logprob(hidden, weight, targets)
    logp.sum().backward()
    assert logp.shape == n
    assert (weight.grad == 0).all()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets, _ = case()
    logp, _, _ = fused_linear_logprob(hidden, weight.detach(), targets)
    logp.sum().backward()
    assert hidden.grad is not None


def test_large_logits_and_excluded_words_keep_their_digits():
    hidden, weight, targets, _ = case(dtype=torch.float32)
    big = fused_linear_logprob(hidden.detach() * 300, weight, targets, return_second_moment=True)
    exact = reference(hidden.detach().double() * 300, weight.double(), targets)
    for one, two in zip(big, exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)
    bias = torch.zeros(11)
    bias[3] = -torch.inf
    found = fused_linear_logprob(
        hidden, weight, torch.zeros_like(targets), bias=bias, return_second_moment=True, entropy_grad=True
    )
    kept = [i for i in range(11) if i != 3]
    expected = reference(hidden, weight[kept], torch.zeros_like(targets))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    found[1].sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": torch.ones(11, 3)}, "hidden must be"),
        ({"targets": torch.zeros(3, 4, dtype=torch.long)}, "targets must be"),
        ({"targets": torch.zeros(3, 5)}, "integers"),
        ({"targets": torch.full((3, 5), 11)}, "between 0 and 10"),
        ({"targets": torch.full((3, 5), -1)}, "between 0 and 10"),
        ({"mask": torch.ones(3)}, "mask must have"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_bad_input_is_an_error_that_names_it(change, named):
    hidden, weight, targets, _ = case()
    with pytest.raises(UsageError, match=named):
        fused_linear_logprob(**({"hidden": hidden, "weight": weight, "targets": targets} | change))
