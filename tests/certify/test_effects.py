"""Models whose own code changes something: themselves, memory under another name, a random generator."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from weightsmith.certify import UnsupportedOperation, bounds, trace

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Stateful(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("count", torch.zeros(()))
        self.drop, self.norm = nn.Dropout2d(0.5), nn.Identity()
        self.seen = []
        self.double().eval()

    def forward(self, x):
        return self.function(self, x)


def counted(self, x):
    self.count += 1
    return x * self.count


def clamped(self, x):
    self.layer.weight.data.clamp_(min=0)
    return self.layer(x)


def clamped_parameter(self, x):
    with torch.no_grad():
        self.w.clamp_(min=0)
    return x @ self.w


def running(self, x):
    self.count.mul_(0.5).add_(x.mean())
    return x - self.count


@pytest.mark.parametrize("function", [counted, clamped, clamped_parameter, running])
def test_what_forward_changes_and_reads_is_refused(function):
    model = Stateful(function)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedOperation, match="outside of forward"):
        trace(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tracing_leaves_attributes_buffers_and_generators_as_they_were():
    def notes(self, x):
        self.count += 1
        self.last = x
        self.seen.append(x)
        return self.layer(x) * torch.tensor([1.0, -1, 2, 0])

    model, state = Stateful(notes), torch.get_rng_state()
    names = set(model.__dict__)
    found = bounds(model, X, 0.1)
    assert model.count == 0
    assert model.seen == []
    assert set(model.__dict__) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.upper >= model(X)).all()


@pytest.mark.parametrize("shape", [(4,), (3, 1)])
def test_noise_is_refused(shape):
    def noisy(self, x):
        return x + torch.randn((*x.shape[:1], 4) if shape == (4,) else shape)

    with pytest.raises(UnsupportedOperation, match="random"):
        trace(Stateful(noisy), X)


def added_under_another_name(self, x):
    x = self.layer(x)
    other = x
    other += 1
    return x * 2


def multiplied_after_a_copy(self, x):
    return x - x.clone().mul_(3)


def counted_sizes(self, x):
    size = x.shape[1]
    more = size
    more += 1
    return F.pad(x, (0, 1)).reshape(-1, more)[:, : size - 1]


@pytest.mark.parametrize("function", [added_under_another_name, multiplied_after_a_copy, counted_sizes])
def test_changes_in_place_are_followed(function):
    model = Stateful(function)
    found = bounds(model, X, 0.0)
    torch.testing.assert_close(found.lower, model(X.clone()))
    torch.testing.assert_close(found.upper, model(X.clone()))


def changed_behind_dropout(self, x):
    x = (x * 1.0).view(-1, 2, 2, 1)
    return F.relu(self.drop(x), inplace=True).flatten(1) - x.flatten(1)


def changed_behind_a_broadcast(self, x):
    x = x * 1.0
    wide = x.broadcast_to(2, *x.shape)
    x.relu_()
    return wide[1]


@pytest.mark.parametrize("function", [changed_behind_dropout, changed_behind_a_broadcast])
def test_memory_that_is_overwritten_behind_a_view_is_refused(function):
    with pytest.raises(UnsupportedOperation, match="overwritten its memory"):
        trace(Stateful(function), X)


def test_a_transposed_parameter_stays_the_models_own():
    model = Stateful(lambda self, x: x @ self.w.T)
    traced = trace(model, X)
    model.w.data = model.w.data + 1
    torch.testing.assert_close(bounds(traced, X, 0.0).lower, model(X))


@fx.wrap
def scale(x, w):
    return x.abs() * w


@fx.wrap
def relu(x):
    return -x


@pytest.mark.parametrize("function", [lambda _, x: scale(x, 2.0), lambda _, x: relu(x), lambda _, x: F.normalize(x)])
def test_a_function_that_only_has_the_name_of_a_rule_is_refused(function):
    with pytest.raises(UnsupportedOperation, match="has no bounds"):
        trace(Stateful(function), X)


def test_pools_that_return_indices_are_refused():
    def pooled(self, x):
        values, _ = self.pool(x[:, None])
        return values[:, 0]

    model = Stateful(pooled)
    model.pool = nn.MaxPool1d(2, return_indices=True)
    with pytest.raises(UnsupportedOperation, match="MaxPool1d"):
        trace(model, X)
