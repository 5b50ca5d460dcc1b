"""Algebra that must hold for any numbers."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.reweight import LossRescaler, SampleStatsMemory, directional_derivatives, rescaler_features
from weightsmith.reweight.meta_gradient import head_derivatives, meta_gradient, trainable, virtual_step_
from weightsmith.reweight.rescaler import normalizer
from weightsmith.reweight.signals import kl_normal, overlap_normal, signals

means = st.floats(-50, 50)
spreads = st.floats(1e-4, 50)
seeds = st.integers(0, 10_000)


def double(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@given(means, spreads, means, spreads)
@example(0.0, 1.0000000000000002e-4, 1e-4, 1e-4)
def test_overlap_equals_the_standard_librarys(m, s, center, spread):
    if abs(s - spread) < 1e-6 * s:  # there the standard library subtracts nearly equal numbers
        wanted = math.erfc(abs(m - center) / (2 * s * math.sqrt(2)))
    else:
        wanted = NormalDist(m, s).overlap(NormalDist(center, spread))
    assert overlap_normal(*double(m, s, center, spread)).item() == pytest.approx(wanted, abs=2e-6)


@given(means, spreads, means, spreads)
def test_overlap_is_symmetric_and_one_only_for_equals(m, s, center, spread):
    there, back = overlap_normal(*double(m, s, center, spread)), overlap_normal(*double(center, spread, m, s))
    torch.testing.assert_close(there, back, rtol=1e-6, atol=1e-9)
    assert 0 <= there.item() <= 1
    assert overlap_normal(*double(m, s, m, s)).item() == 1


@pytest.mark.parametrize("difference", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_overlap_of_nearly_equal_spreads_does_not_cancel(difference):
    found = overlap_normal(*double(0.0, 1.0, 0.5, 1.0 + difference)).item()
    assert found == pytest.approx(math.erfc(0.25 / math.sqrt(2)), abs=difference + 1e-9)


@given(means, spreads, means, spreads)
def test_divergence_is_torchs_and_zero_where_a_spread_is(m, s, center, spread):
    found = kl_normal(*double(m, s, center, spread))
    normal = [torch.distributions.Normal(*pair) for pair in (double(m, s), double(center, spread))]
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*normal), rtol=1e-9, atol=1e-9)
    assert kl_normal(*double(m, 0.0, center, spread)).item() == 0
    assert kl_normal(*double(m, s, center, 0.0)).item() == 0


def slow_features(batches, classes, window, batch_size, separate):
    """The definition, in loops: lists per class, statistics of Python's own."""
    kept = {c: [] for c in range(classes)}
    tables = []
    for losses, logits, labels in batches:
        G, B = losses.shape
        confidence = logits.softmax(-1).amax(-1)
        votes = logits.argmax(-1) == labels
        rows = []
        for i in range(B):
            hits = int(votes[:, i].sum())
            agrees = bool(votes[0, i]) if 2 * hits == G else 2 * hits > G
            std = (lambda x: float(x.std())) if G > 1 else (lambda x: 0.0)
            row = [float(losses[:, i].mean()), std(losses[:, i]), float(confidence[:, i].mean()), std(confidence[:, i])]
            rows.append((row, agrees, int(labels[i]) if separate else 0))
        if window == 0:
            kept = {c: [] for c in range(classes)}
        for row in rows:
            kept[row[2]] = [*kept[row[2]], row][-max(window * batch_size, B) :]
        table = []
        for row, agrees, group in rows:
            members = torch.tensor([r for r, a, _ in kept[group] if a == agrees], dtype=torch.float64)
            mean = members.mean(0)

            def pair(values):
                return [values.mean().item(), values.std().item() if len(values) > 1 else 1e-8]

            M, S = mean[0], mean[1]
            kl = kl_normal(members[:, 0], members[:, 1], M, S)
            overlap = overlap_normal(members[:, 0], members[:, 1], M, S)
            own = torch.tensor(row, dtype=torch.float64)
            line = []
            for k in range(4):
                line += [row[k], *pair(members[:, k])]
            line += [kl_normal(own[0], own[1], M, S).item(), *pair(kl)]
            line += [overlap_normal(own[0], own[1], M, S).item(), *pair(overlap), float(agrees)]
            table.append(line)
        tables.append(torch.tensor(table, dtype=torch.float64))
    return tables


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_features_are_those_of_the_definition(seed, classes, passes, window, separate):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in (7, 7, 5):
        logits = torch.randn(passes, size, classes, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (size,), generator=generator)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(passes), reduction="none")
        batches.append((losses.view(passes, size), logits, labels))
    memory = SampleStatsMemory(classes, window, 7, class_separation=separate)
    wanted = slow_features(batches, classes, window, 7, separate)
    for batch, table in zip(batches, wanted, strict=True):
        torch.testing.assert_close(rescaler_features(*batch, memory), table, rtol=1e-6, atol=1e-8)


def test_a_memory_that_grows_keeps_what_it_has():
    memory = SampleStatsMemory(2, window=2)
    one = torch.tensor([0])
    for number in range(3):
        memory.add(torch.full((1, 5), float(number)), one)  # two slots per class so far
    memory.add(torch.full((2, 5), 9.0), torch.tensor([0, 1]))  # four from here on
    values, counted = memory.members(torch.tensor([0]), torch.tensor([9.0]))
    assert values[0, counted[0], 0].tolist() == [9.0]
    assert memory._values[0, :3, 0].tolist() == [1.0, 2.0, 9.0]
    assert memory._seen.tolist() == [3, 1]


@given(seeds)
def test_pass_0_decides_a_tie(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 9, 3, generator=generator)
    labels = torch.randint(3, (9,), generator=generator)
    right = logits.argmax(-1) == labels
    found = signals(torch.zeros(2, 9), logits, labels).agreement.bool()
    assert torch.equal(found, torch.where(right[0] == right[1], right[0], right[0]))


@settings(max_examples=20, deadline=None)
@given(seeds, st.booleans())
def test_weights_are_those_of_torchs_own_layers(seed, separate):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (9,), generator=generator)
    rescaler = LossRescaler(3, 5, separate, seed=seed).double()
    outputs = []
    for first, second in zip(rescaler.first, rescaler.second, strict=True):
        layers = nn.Sequential(
            nn.Linear(5, 5),
            nn.BatchNorm1d(5, affine=False),
            nn.ReLU(),
            nn.Linear(5, 2),
            nn.BatchNorm1d(2, affine=False),
        ).double()
        layers[0].weight.data, layers[3].weight.data = first.data, second.data
        outputs.append(layers(features).softmax(-1)[:, 1])
    wanted = torch.stack([outputs[int(y) if separate else 0][i] for i, y in enumerate(labels)])
    found = rescaler(features, labels)
    torch.testing.assert_close(found, wanted)
    assert ((found > 0) & (found < 1)).all()


@given(st.floats(-1e6, 1e6), st.integers(2, 40))
def test_equal_features_get_a_weight_of_one_half(value, size):
    w = LossRescaler(4)(torch.full((size, 19), value), torch.arange(size) % 4)
    torch.testing.assert_close(w, torch.full((size,), 0.5), rtol=0, atol=1e-5)


def test_binary_weights_round_and_keep_the_gradient():
    features, labels = torch.randn(8, 19), torch.arange(8) % 2
    soft, hard = LossRescaler(2), LossRescaler(2, binary=0.5)
    w, b = soft(features, labels), hard(features, labels)
    assert set(b.tolist()) <= {0.0, 1.0}
    assert torch.equal(b, (w >= 0.5).float())
    (w * torch.arange(8) / 8).sum().backward()
    (b * torch.arange(8) / 8).sum().backward()
    torch.testing.assert_close(hard.first.grad, soft.first.grad)


@settings(max_examples=25)
@given(seeds)
def test_normalizers_keep_the_mean_weight_or_the_loss_and_have_no_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(6, generator=generator, dtype=torch.float64).requires_grad_()
    losses = torch.rand(6, generator=generator, dtype=torch.float64)
    by_mean, by_loss = normalizer(w, losses, "mean"), normalizer(w, losses, "loss")
    assert (by_mean * w).mean().item() == pytest.approx(1)
    assert (by_loss * w * losses).sum().item() == pytest.approx(losses.sum().item())
    assert not by_mean.requires_grad
    assert not by_loss.requires_grad
    # were it not a constant, the weighted sum would not depend on the weights at all
    gradient = torch.autograd.grad((by_loss * w * losses).sum(), w)[0]
    assert gradient.abs().min() > 0


def test_normalizers_survive_losses_of_zero():
    assert normalizer(torch.ones(3), torch.zeros(3), "loss").item() == 1
    assert normalizer(torch.zeros(3), torch.ones(3), "mean").isfinite()


def network(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def sample(seed, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=dtype)
    return x, torch.randint(3, (size,), generator=generator)


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0.01, 1.0))
def test_every_mode_gives_the_gradient_of_the_definition(seed, lr):
    model = network(seed)
    (x, y), (x_val, y_val) = sample(seed), sample(seed + 1)
    theta = trainable(model)
    names = [name for name, _ in model.named_parameters()]
    w = torch.rand(6, dtype=torch.float64)

    def losses(values, x, y):
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.cross_entropy(out, y, reduction="none")

    wanted = meta_gradient(lambda t: losses(t, x, y), lambda t: losses(t, x_val, y_val).mean(), w, theta, lr)
    g = torch.autograd.grad((w * losses(theta, x, y)).sum(), theta)
    moved = [(p - lr * q).detach().requires_grad_() for p, q in zip(theta, g, strict=True)]
    v = torch.autograd.grad(losses(moved, x_val, y_val).mean(), moved)
    before = [p.detach().clone() for p in theta]
    for mode in ("finite_difference", "jvp", "double_backward"):
        found = -lr * directional_derivatives(lambda: losses(theta, x, y), model, v, mode) if mode != "jvp" else None
        if found is None:
            found = -lr * directional_derivatives(
                lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), model, v, mode
            )
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        assert all(torch.equal(p, start) for p, start in zip(theta, before, strict=True))


def test_finite_differences_in_single_precision_are_close_and_restore_every_bit():
    model, (x, y) = network(3, torch.float32), sample(3, dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    losses = lambda: nn.functional.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    v = [torch.randn_like(p) for p in model.parameters()]
    exact = directional_derivatives(losses, model, v, "double_backward")
    torch.testing.assert_close(directional_derivatives(losses, model, v), exact, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    nothing = [torch.zeros_like(p) for p in v]
    assert directional_derivatives(losses, model, nothing).tolist() == [0.0] * 6


def test_the_head_form_is_exact_for_the_last_layer():
    model, (x, y) = network(5), sample(5)
    head = model[2]
    for p in model[0].parameters():
        p.requires_grad_(False)
    v = [torch.randn_like(p) for p in head.parameters()]
    losses = lambda: nn.functional.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    h = torch.tanh(model[0](x))
    slopes = head(h).softmax(-1) - nn.functional.one_hot(y, 3)
    found = head_derivatives(slopes, h, v[0], v[1])
    torch.testing.assert_close(found.detach(), directional_derivatives(losses, model, v, "jvp"))


def test_a_sign_step_has_the_slope_of_its_derivative():
    g = torch.tensor([1e-6, -0.3, 0.0], dtype=torch.float64)
    moves = []
    for shift in (0.0, 1e-10):
        p = torch.zeros(3, dtype=torch.float64)
        slopes = virtual_step_([p], [g + shift], [0.1], sign=True)
        moves.append(p)
    numeric = -(moves[1] - moves[0]) / 1e-10
    torch.testing.assert_close(slopes[0], numeric, rtol=1e-3, atol=1e-3)


def test_an_unknown_mode_is_refused():
    model = network(0)
    with pytest.raises(UsageError, match="mode must be finite_difference, jvp or double_backward, got 'exact'"):
        directional_derivatives(lambda: torch.zeros(1), model, [], "exact")


def test_the_first_weights_of_a_rescaler_are_small_and_normal():
    rescaler = LossRescaler(100)
    assert float(rescaler.first.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(rescaler.second.detach().abs().max()) > 0.05  # beyond a uniform distribution of that deviation
    linear = LossRescaler(100, init="linear")
    assert float(linear.first.detach().abs().max()) == pytest.approx(19**-0.5, rel=0.01)
    generator = torch.Generator().manual_seed(0)  # as recorded experiments were run
    assert torch.equal(linear.first, (2 * torch.rand(100, 19, 19, generator=generator) - 1) * 19**-0.5)
    with pytest.raises(UsageError, match="init"):
        LossRescaler(2, init="zeros")


def test_gradients_of_rounded_weights_are_clamped():
    features, labels, pull = torch.randn(8, 19), torch.arange(8) % 2, torch.linspace(-9, 9, 8)
    soft, hard = LossRescaler(2), LossRescaler(2, binary=0.5)
    (soft(features, labels) * pull.clamp(-1, 1)).sum().backward()
    (hard(features, labels) * pull).sum().backward()
    torch.testing.assert_close(hard.first.grad, soft.first.grad)


@pytest.mark.parametrize("normalize", ["mean", "loss"])
def test_weights_that_are_all_zero_are_not_multiplied_by_a_huge_factor(normalize):
    assert normalizer(torch.zeros(4), torch.ones(4), normalize) == 1
    assert normalizer(torch.full((4,), 0.25), torch.ones(4), normalize) == 4
