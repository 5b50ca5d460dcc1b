"""Every row of the table of pitfalls: what must be refused, and what must not produce NaN."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightsmith.certify import (
    IBP,
    MTLIBP,
    SABR,
    BoundOptions,
    BoundRegularizer,
    CertifiedTraining,
    CrownIBP,
    EpsilonSchedule,
    Recipe,
    add_batchnorm_,
    bounds,
    input_box,
    margins,
    pgd,
    register_bound,
    trace,
    verified_error,
)
from weightsmith.certify.bounding import make_box, run_box
from weightsmith.core.errors import UsageError

X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])


def net(hidden=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite"),
        ({"eps": float("inf")}, "eps must be finite"),
        ({"eps": torch.zeros(5)}, r"eps of shape \(5,\) does not broadcast to x of shape \(4, 6\)"),
        ({"eps": torch.zeros(2, 4, 6)}, "does not broadcast"),
        ({"eps": None}, "give lower and upper"),
        ({"lower": 1.0, "upper": 0.0}, "lower must be at most upper"),
        ({"lower": 2.0}, "is x itself between"),
        ({"upper": float("nan")}, "upper must be finite"),
        ({"x": X / 0}, "x must be finite"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, "x must be a floating-point tensor"),
        ({"method": "alpha"}, "method 'alpha' is not known"),
        ({"C": torch.zeros(2, 4)}, r"C must have the shape \(S, 3\) or \(4, S, 3\), got \(2, 4\)"),
        ({"C": torch.zeros(3, 2, 3)}, "C must have the shape"),
        ({"C": torch.full((1, 3), float("nan"))}, "C must be finite"),
        (
            {"method": "crown", "options": BoundOptions(rounding="outward")},
            "rounding='outward' is there for method='ibp'",
        ),
    ],
)
def test_bad_arguments_of_bounds_are_named(change, words):
    given = {"x": X, "eps": 0.1} | change
    with pytest.raises(UsageError, match=words):
        bounds(net(), given.pop("x"), given.pop("eps"), **given)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 3, 0]), torch.tensor([-1, 0, 0, 0]), torch.rand(4), Y[:2]])
def test_labels_out_of_range_or_shape_are_refused(labels):
    with pytest.raises(UsageError, match="labels"):
        margins(net(), X, labels, 0.1)


def test_an_input_on_a_limit_that_was_rounded_in_float64_is_within_it():
    mean, std = 0.4914, 0.247
    limits = torch.tensor([0.0, 1.0], dtype=torch.float64).sub(mean).div(std).float()
    assert limits.nextafter(torch.tensor(torch.inf))[1] > limits[1]
    x = torch.stack([limits.nextafter(torch.tensor(-torch.inf))[0], limits.nextafter(torch.tensor(torch.inf))[1]])
    box = input_box(x[None], 0.0, limits[0].item(), limits[1].item())
    assert (box.lower <= x).all()
    assert (box.upper >= x).all()
    assert (box.lower <= box.upper).all()
    assert torch.equal(torch.cat([box.upper[0, :1], box.lower[0, 1:]]), limits)
    with pytest.raises(UsageError, match="is x itself between"):
        input_box(x[None] * 1.00001, 0.0, limits[0].item(), limits[1].item())


@pytest.mark.parametrize("method", ["crown", "crown-ibp"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_a_clamp_at_an_activation_without_linear_bounds_is_named(end, method):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)[:, :3]

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return torch.clamp(self.first(x), **{end: self.second(x)})

    model = Clamped()
    with pytest.raises(NotImplementedError, match=r"'clamp': clamp with tensors has no linear bounds"):
        bounds(model, X, 0.1, method=method)
    found = bounds(model, X, 0.1)
    assert (found.lower <= model(X)).all()
    assert (found.upper >= model(X)).all()
    model.first = Constant()
    with pytest.raises(NotImplementedError, match=r"'clamp'.* has no linear bounds"):
        bounds(model, X, 0.1, method=method)


def test_options_and_registrations_are_checked():
    for bad in ({"relu": "two"}, {"rounding": "up"}, {"statistics": "none"}):
        with pytest.raises(UsageError, match="is not known"):
            BoundOptions(**bad)
    with pytest.raises(UsageError, match="dtype must be"):
        bounds(net(), X, 0.1, options=BoundOptions(dtype=torch.float16))
    with pytest.raises(UsageError, match="op must be"):
        register_bound("relu", ibp=lambda x: x)
    with pytest.raises(NotImplementedError, match=r"softmax.*rounding errors are not analyzed"):
        bounds(nn.Sequential(net(), nn.Softmax(1)), X, 0.1, options=BoundOptions(rounding="outward"))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("training", [True, False])
def test_a_box_of_size_zero_gives_the_output_and_no_nan(method, training):
    model = normed().train(training)
    before = copy.deepcopy(model)
    found = bounds(model, X, 0.0, method=method)
    torch.testing.assert_close(found.lower, before(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.upper, before(X), rtol=1e-5, atol=1e-5)
    (found.lower.sum() + found.upper.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    done = run_box(trace(model, X), (make_box(model, (X,), 0.0, None, None, BoundOptions()),), (X,), method="ibp",
                   options=BoundOptions())  # fmt: skip
    assert all(part.isfinite() for part in BoundRegularizer()(done))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_a_relu_at_exactly_zero_has_no_nan(method):
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    found = bounds(model, X, 0.1, method=method)
    found.lower.sum().backward()
    assert found.lower.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_huge_widths_leave_every_loss_finite():
    for recipe in (IBP(), CrownIBP(), CrownIBP(fused=False), SABR(), MTLIBP()):
        model = net()
        with torch.no_grad():
            model[2].weight.mul_(1e4)
        training = CertifiedTraining(
            model, 10.0, EpsilonSchedule(10.0, 10, length=1), X, recipe=Recipe(objective=recipe, batchnorm=False)
        )
        for _ in range(5):
            training.step()
        model.requires_grad_()
        loss = training.loss(X, Y)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_one_in_training_mode_has_torchs_own_error():
    model = normed().train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        bounds(model, X[:1], 0.1)
    with pytest.raises(ValueError) as theirs:
        model(X[:1])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norm_without_parts_does_what_torch_does(options, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 3)).train(training)
    other = copy.deepcopy(model)
    torch.testing.assert_close(bounds(model, X, 0.0).lower, other(X), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    if options == {"track_running_stats": False}:
        found = bounds(model, X, 0.01)
        assert (found.lower <= found.upper).all()


def test_running_statistics_are_updated_once_by_the_clean_pass_or_not_at_all():
    model, other = normed().train(), normed().train()
    bounds(model, X, 0.3)
    other(X)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = [buffer.clone() for buffer in model.buffers()]
    bounds(model, X, 0.3, options=BoundOptions(update_statistics=False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_detached_and_centered_statistics_are_there():
    model = normed().train()
    plain = bounds(model, X, 0.1)
    detached = bounds(model, X, 0.1, options=BoundOptions(detach_statistics=True))
    torch.testing.assert_close(plain.lower, detached.lower)
    plain.lower.sum().backward()
    grad = model[0].weight.grad.clone()
    model.zero_grad()
    detached.lower.sum().backward()
    assert not torch.allclose(grad, model[0].weight.grad)
    clipped = {"lower": 0.0, "upper": 1.0}  # the center is then not the input
    center = bounds(model, X, 0.4, options=BoundOptions(statistics="center"), **clipped)
    assert not torch.allclose(center.lower, bounds(model, X, 0.4, **clipped).lower)


def test_a_trained_dropout_has_one_mask_for_everything():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).train()
    found = bounds(model, X, 0.0)
    torch.testing.assert_close(found.lower, found.upper)


@pytest.mark.parametrize("training", [True, False])
def test_certifying_puts_the_model_into_evaluation_mode_and_back(training):
    model = normed().train(training)
    model[1].eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    error = verified_error(model, [(X, Y), (X[:1], Y[:1])], 0.05)
    assert [m.training for m in model.modules()] == [training, training, False, training, training]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert len(error.certificates.margins) == 5
    assert error.standard <= error.attacked <= float(error)


def test_regularizers_guard_layers_that_are_all_dead_all_alive_or_have_one_neuron():
    for hidden, bias, expected in ((1, 5.0, 0.0), (8, 5.0, 0.0), (8, -50.0, 2.0), (1, -50.0, 2.0)):
        model = net(hidden)
        with torch.no_grad():
            model[0].bias.fill_(bias)
        box = make_box(model, (X,), 0.01, None, None, BoundOptions())
        done = run_box(trace(model, X), (box,), (X,), method="ibp", options=BoundOptions())
        found = BoundRegularizer()(done)
        assert found.balance.item() == pytest.approx(expected)
        (found.tightness + found.balance).backward()
        assert model[0].weight.grad.isfinite().all()
    with pytest.raises(UsageError, match="ReLU"):
        BoundRegularizer()(run_box(trace(nn.Linear(6, 3), X), (box,), (X,), method="ibp", options=BoundOptions()))
    with pytest.raises(UsageError, match="tolerance"):
        BoundRegularizer(0.0)


def test_eps_may_differ_by_channel_and_example():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.rand(2, 2, 2, 2)
    per_channel = torch.tensor([0.1, 0.2]).view(2, 1, 1)
    torch.testing.assert_close(
        bounds(model, x, per_channel).lower, bounds(model, x, per_channel.expand_as(x)).lower, rtol=1e-6, atol=1e-6
    )
    per_example = torch.tensor([0.0, 0.1]).view(2, 1, 1, 1)
    torch.testing.assert_close(bounds(model, x, per_example).lower[0], model(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch and start"),
        ({"length": -1}, "length at least 0"),
        ({"shape": "cubic"}, "shape 'cubic' is not known"),
        ({"middle": 1.0}, "middle must be"),
    ],
)
def test_bad_schedules_are_refused(change, words):
    given = {"eps": 0.1, "steps_per_epoch": 5} | change
    with pytest.raises(UsageError, match=words):
        EpsilonSchedule(given.pop("eps"), given.pop("steps_per_epoch"), **given)


def test_a_schedule_of_length_zero_has_its_full_size_at_once():
    schedule = EpsilonSchedule(0.1, 5, start=2, length=0)
    assert [schedule.value(step) for step in (0, 4, 5, 6)] == [0.0, 0.0, 0.1, 0.1]


def test_bad_recipes_are_refused_before_the_model_is_touched():
    model = net()
    before = copy.deepcopy(model.state_dict())
    for bad, words in (
        (lambda: Recipe(objective="pgd"), "objective 'pgd' is not known"),
        (lambda: Recipe(kappa_start=2.0), "kappa_start must be between"),
        (lambda: Recipe(weight=-1.0), "weight must be at least 0"),
        (lambda: SABR(share=0.0), "share must be above 0"),
        (lambda: MTLIBP(alpha=2.0), "alpha must be between"),
        (lambda: CertifiedTraining(model, 0.2, EpsilonSchedule(0.1, 5), X), "schedule must end at eps=0.2"),
        (lambda: CertifiedTraining(model, 0.1, EpsilonSchedule(0.1, 5), X, lower=1.0, upper=0.0), "lower must be"),
        (lambda: CertifiedTraining(model, 0.1, EpsilonSchedule(0.1, 5), X, std=0.0), "std must be above 0"),
        (lambda: verified_error(model, [], 0.1), "loader gives no batches"),
        (lambda: verified_error(model, [X], 0.1), "loader must give"),
        (lambda: pgd(model, input_box(X, 0.1), Y, steps=0), "steps and restarts"),
    ):
        with pytest.raises(UsageError, match=words):
            bad()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_batch_norm_comes_behind_every_hidden_layer_and_nowhere_else():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
        nn.ReLU(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    assert add_batchnorm_(model, torch.rand(2, 1, 8, 8)) is model
    kinds = [[type(part).__name__ for part in layer] if isinstance(layer, nn.Sequential) else None for layer in model]
    assert kinds[0] == ["Conv2d", "BatchNorm2d"]
    assert kinds[6] == ["Linear", "BatchNorm1d"]
    assert [kinds[index] for index in (2, 8)] == [None, None]


def test_batch_norm_is_not_put_where_a_layer_is_used_in_another_way():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x)) * self.a.weight.mean())

    model = Peeks()
    with pytest.raises(UsageError, match="uses a layer in another way"):
        add_batchnorm_(model, X)
    assert type(model.a) is nn.Linear
