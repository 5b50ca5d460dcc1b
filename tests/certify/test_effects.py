"""Models whose own code changes something: themselves, memory under another name, a random generator."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from weightsmith.certify import UnsupportedOperation, bounds, trace, verified_error
from weightsmith.core.errors import UsageError

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


def written_by_out(self, x):
    z = self.layer(x)
    torch.mul(z, 2, out=z)
    return z


def written_by_add_out(self, x):
    z = self.layer(x)
    torch.add(z, x, alpha=2, out=z)
    return z


def written_as_a_list(self, x):
    z = self.layer(x)
    torch._foreach_mul_([z], 3.0)
    return z


def written_by_setitem(self, x):
    z = self.layer(x)
    z.__setitem__((slice(None), 0), 0.0)
    return z


def given_other_data(self, x):
    z = self.layer(x)
    z.data = x
    return z


def given_another_real_part(self, x):
    z = self.layer(x)
    z.real = x
    return z


def added_to_its_data(self, x):
    z = self.layer(x)
    z.data += x
    return z


def given_another_memory(self, x):
    z = self.layer(x)
    z.set_(x)
    return z


def resized(self, x):
    z = self.layer(x)
    torch.Tensor.resize_(z, 3, 4)
    return z


def copied_over(self, x):
    z = self.layer(x)
    torch.Tensor.copy_(z, x)
    return z


def written_by_an_overload(self, x):
    z = self.layer(x)
    torch.ops.aten.mul.out(z, x, out=z)
    return z


def written_by_a_module(self, x):
    z = self.layer(x)
    self.threshold(z)
    return z


WRITES = [
    written_by_out, written_by_add_out, written_as_a_list, written_by_setitem, given_other_data,
    given_another_real_part, added_to_its_data, given_another_memory, resized, copied_over, written_by_an_overload,
    written_by_a_module,
]  # fmt: skip


def stateful(function):
    model = Stateful(function)
    model.threshold = nn.Threshold(0.0, 0.5, inplace=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("by_export", [False, True])
@pytest.mark.parametrize("function", WRITES)
def test_writes_that_cannot_be_followed_are_refused_and_never_dropped(function, by_export):
    def called(self, x):
        if by_export:
            assert x.shape[1] == 4  # which torch.fx cannot follow
        return function(self, x)

    with pytest.raises(UnsupportedOperation):
        trace(stateful(called), X)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (written_by_out, r"'mul': mul\(out=...\) writes into memory"),
        (written_as_a_list, "_foreach_mul_ writes into memory"),
        (written_by_setitem, "__setitem__ writes into memory"),
        (given_other_data, r"a tensor's .data = ... writes into memory"),
        (given_another_memory, "set_ writes into memory"),
    ],
)
def test_a_refused_write_is_named(function, words):
    with pytest.raises(UnsupportedOperation, match=words):
        trace(stateful(function), X)


def through_an_attribute(self, x):
    z = self.layer(x)
    other = z.T
    other += 1
    return z * 2


def through_ravel(self, x):
    z = self.layer(x)
    z.ravel().mul_(2)
    return z


def through_unfold(self, x):
    z = self.layer(x)
    z.unfold(1, 2, 2).mul_(2)
    return z


def through_a_part_of_a_constant(self, x):
    z = torch.zeros(3, 4, dtype=x.dtype)
    z[0].add_(x[0])
    return self.layer(x) + z


def through_a_constant(self, x):
    z = torch.zeros(3, 4, dtype=torch.float64)
    z.__iadd__(x)
    return self.layer(x) + z


@fx.wrap
def doubled(x):
    return x.mul_(2)


def through_a_function_of_its_own(self, x):
    z = self.layer(x)
    doubled(z)
    return z


@pytest.mark.parametrize(
    "function",
    [
        through_an_attribute, through_ravel, through_unfold, through_a_part_of_a_constant, through_a_constant,
        through_a_function_of_its_own,
    ],
)  # fmt: skip
def test_a_write_behind_a_view_or_a_constant_is_not_dropped(function):
    with pytest.raises(UnsupportedOperation):
        trace(stateful(function), X)


def test_what_is_accumulated_into_zeros_is_followed():
    def accumulated(self, x):
        total = torch.zeros_like(x)
        other = total
        other += self.layer(x)
        return total + x

    model = Stateful(accumulated)
    torch.testing.assert_close(bounds(model, X, 0.0).lower, model(X))


class Masked(Stateful):
    def forward(self, x, first, second):
        return self.function(self, x, first, second)


def with_a_combined_mask(self, x, first, second):
    both = first & second
    return x * both + self.layer(x) * first


def with_a_changed_mask(self, x, first, second):
    other = first
    other &= second
    return x * other + self.layer(x) * first


@pytest.mark.parametrize("function", [with_a_combined_mask, with_a_changed_mask])
def test_masks_change_where_the_model_changes_them_and_only_there(function):
    model = Masked(function)
    first, second = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    found = bounds(model, (X, first, second), 0.0)
    torch.testing.assert_close(found.lower, model(X, first.clone(), second))


def by_batch(self, x):
    return self.layer(x) if x.shape[0] > 3 else x * 2


def by_features(self, x):
    z = self.layer(x.mean(1))
    return z * 2 if x.shape[1] > 4 else z


def by_a_number(self, x):
    return self.layer(x.mean(1)) * float(x.shape[1])


def by_length(self, x):
    return self.layer(x) * len(x)


@pytest.mark.parametrize("method", ["ibp", "crown"])
@pytest.mark.parametrize(
    ("function", "first", "others"),
    [
        (by_batch, (3, 4), [(2, 4), (4, 4), (5, 4), (1, 4), (3, 4)]),
        (by_length, (3, 4), [(2, 4), (4, 4), (1, 4)]),
        (by_features, (2, 3, 4), [(2, 6, 4), (3, 2, 4)]),
        (by_a_number, (2, 3, 4), [(2, 6, 4), (2, 3, 4)]),
    ],
)
def test_a_model_that_reads_sizes_is_traced_for_every_shape(function, first, others, method):
    model = Stateful(function)
    traced = trace(model, torch.rand(first, dtype=torch.float64))
    for shape in others:
        x = torch.rand(shape, dtype=torch.float64)
        found = bounds(traced, x, 0.0, method=method)
        torch.testing.assert_close(found.lower, model(x))
        torch.testing.assert_close(found.upper, model(x))


def test_a_smaller_last_batch_is_certified_by_what_the_model_does_with_it():
    model = Stateful(by_batch)
    x = torch.rand(6, 4, dtype=torch.float64)
    labels = torch.cat([model(x[:4]), model(x[4:])]).argmax(1)
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    assert verified_error(model, batches, 0.0).standard == 0.0


def test_examples_are_told_apart_in_inputs_of_another_length():
    def mixed(self, x):  # the axis of the examples is the second one, after that of the sequence
        z = F.relu(self.layer(x.transpose(0, 1).reshape(-1, 4)))
        return self.layer(z).reshape(x.shape[1], -1, 4).sum(0)

    model = Stateful(mixed)
    traced = trace(model, torch.rand(2, 3, 4, dtype=torch.float64))
    bounds(traced, torch.rand(2, 3, 4, dtype=torch.float64), 0.1, method="crown")
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    here, anew = (bounds(m, x, 0.2, method="crown") for m in (traced, model))
    torch.testing.assert_close(here.lower, anew.lower)
    torch.testing.assert_close(here.upper, anew.upper)


class Repeated(Stateful):
    def forward(self, x, times):
        return self.layer(x) * 2 if times > 1 else self.layer(x)


def test_a_number_that_the_model_branches_on_is_not_kept_from_the_first_call():
    model = Repeated(None)
    traced = trace(model, (X, 1))
    torch.testing.assert_close(bounds(traced, (X, 2), 0.0).lower, model(X, 2))
    with pytest.raises(UsageError, match="x must hold 2 inputs"):
        bounds(traced, X, 0.0)


def test_an_ordinary_model_is_traced_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    traced = trace(model, torch.rand(2, 4))
    assert traced.graph([torch.rand(2, 4)]) is traced.graph([torch.rand(7, 4)])
