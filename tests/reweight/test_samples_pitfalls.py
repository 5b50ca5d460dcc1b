"""Every row of the table of pitfalls, and bad input."""

import warnings

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reweight import LossRescaler, MetaRescaler, RandomBatches, RescalingSettings, SampleStatsMemory
from weightsmith.reweight.meta_gradient import directional_derivatives
from weightsmith.reweight.signals import rescaler_features


def weights_of(module):
    return [value.detach().clone() for value in module.parameters()]


def equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def rescaling(model, *, lr=0.1, classes=3, **options):
    return MetaRescaler(model, torch.optim.SGD(model.parameters(), lr=lr), classes, **({"passes": 2} | options))


def test_a_batch_of_one_counts_fully_and_teaches_nothing(net, data):
    meta = rescaling(net(norm=False))
    before = weights_of(meta.rescaler)
    result = meta.step(data(1))
    assert result.weights.tolist() == [1.0]
    assert result.meta_loss is None
    assert equal(weights_of(meta.rescaler), before)
    meta.step(data(8), val_batch=data(8))
    assert not equal(weights_of(meta.rescaler), before)


def test_equal_samples_get_one_half(net):
    meta = rescaling(net(dropout=0.0), passes=1)
    result = meta.step((torch.ones(8, 6), torch.zeros(8, dtype=torch.int64)))
    torch.testing.assert_close(result.weights, torch.full((8,), 0.5), rtol=0, atol=1e-5)


def test_a_model_without_dropout_works_and_is_told_once_to_take_one_pass(net, data):
    meta = rescaling(net(dropout=0.0), passes=3)
    with pytest.warns(WeightsmithWarning, match="take passes=1"):
        meta.step(data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meta.step(data()).weights.isfinite().all()
        rescaling(net(dropout=0.0), passes=1).step(data())


def test_a_group_of_one_has_a_tiny_spread():
    logits = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 1.0]]]).repeat(3, 1, 1)
    labels = torch.tensor([0, 1, 1])
    losses = nn.functional.cross_entropy(logits[0], labels, reduction="none").repeat(3, 1)
    found = rescaler_features(losses, logits, labels, SampleStatsMemory(2))
    assert found[0, [2, 5, 8, 11, 14, 17]].tolist() == pytest.approx([1e-8] * 6)
    assert found[1, 2] > 1e-3


def test_huge_divergences_are_clamped_unless_asked_not_to_be():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 6, generator=generator) * 1e-6 + torch.arange(6)
    logits, labels = torch.zeros(3, 6, 2), torch.zeros(6, dtype=torch.int64)
    free = rescaler_features(losses, logits, labels, SampleStatsMemory(2))
    assert free[:, 12].max() > 1e6
    clamped = rescaler_features(losses, logits, labels, SampleStatsMemory(2), clamp=1e4)
    assert clamped.abs().max() == 1e4
    assert RescalingSettings().clamp == 1e4


def test_a_loss_that_is_not_finite_names_its_samples_and_changes_nothing(net, data):
    meta = rescaling(net())
    meta.step(data())
    before, state = weights_of(meta.model) + weights_of(meta.rescaler), meta._observer.memories["training"].state_dict()
    x, y = data()
    x[[3, 5]] = float("nan")
    with pytest.raises(FloatingPointError, match=r"training loss is not finite .* with ids 103, 105"):
        rescaling(net(norm=False)).step((x, y), ids=torch.arange(100, 112))
    model = net(norm=False)
    other = rescaling(model)
    with pytest.raises(FloatingPointError, match="positions in the batch 3, 5"):
        other.step((x, y))
    assert other._observer.memories["training"]._values is None
    with pytest.raises(FloatingPointError, match="validation loss is not finite"):
        other.step(data(), val_batch=(x, y))
    assert equal(weights_of(model), weights_of(net(norm=False)))  # the virtual step is taken back
    assert equal(before, weights_of(meta.model) + weights_of(meta.rescaler))
    assert torch.equal(state["values"], meta._observer.memories["training"]._values)


def test_a_further_pass_that_is_not_finite_is_named_too(net, data):
    calls = []

    def forward(model, batch):
        calls.append(1)
        logits = model(batch[0])
        return (logits if len(calls) != 1 else logits.index_fill(0, torch.tensor([4]), float("nan"))), batch[1]

    model = net()
    meta = MetaRescaler(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, forward, passes=2)
    with pytest.raises(FloatingPointError, match="positions in the batch 4"):
        meta.step(data())
    assert meta._observer.memories["training"]._values is None


def test_the_network_of_an_absent_class_gets_no_gradient(net, data):
    meta = rescaling(net())
    x, y = data()
    meta.step((x, y % 2), val_batch=(x, y % 2))
    assert not meta.rescaler.first.grad[2].any()
    assert meta.rescaler.first.grad[:2].any()


def test_many_classes_warn(net):
    with pytest.warns(WeightsmithWarning, match="with 51 classes .* class_separation=False"):
        rescaling(net(classes=51), classes=51)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net(classes=51)
        MetaRescaler(model, torch.optim.Adam(model.parameters()), LossRescaler(51, class_separation=False))


def test_ignored_labels_have_weight_0_and_no_part_in_any_statistics(net, data):
    x, y = data()
    y[[2, 7]] = -100
    ids = torch.arange(12)
    meta = rescaling(net(norm=False, dropout=0.0), passes=1)
    result = meta.step((x, y), val_batch=data(), ids=ids)
    assert result.weights[[2, 7]].tolist() == [0, 0]
    assert result.losses[[2, 7]].tolist() == [0, 0]
    assert set(meta.weights_by_id) == set(range(12)) - {2, 7}
    other = rescaling(net(norm=False, dropout=0.0), passes=1)
    kept = y >= 0
    same = other.loss((x[kept], y[kept]))
    torch.testing.assert_close(same, result.loss)
    assert torch.equal(meta._observer.memories["training"]._seen, torch.bincount(y[kept], minlength=3))


def test_a_batch_without_labels_is_passed_over(net, data):
    meta = rescaling(net(norm=False))
    before = weights_of(meta.model)
    result = meta.step((data()[0], torch.full((12,), -1)))
    assert result.loss == 0
    assert result.meta_loss is None
    assert equal(before, weights_of(meta.model))


def test_labels_per_token_are_refused(net, data):
    meta = rescaling(net())
    meta.forward_fn = meta._observer.forward_fn = lambda model, batch: (torch.zeros(2, 4, 3), torch.zeros(2, 4).long())
    with pytest.raises(UsageError, match="labels must be one class number per sample"):
        meta.step(data())
    meta._observer.forward_fn = lambda model, batch: (torch.zeros(2, 4, 3), torch.zeros(2).long())
    with pytest.raises(UsageError, match="make one loss per sequence first"):
        meta.step(data())


@pytest.mark.parametrize("mode", ["finite_difference", "jvp", "double_backward", "head", "none"])
def test_running_statistics_are_those_of_one_plain_pass(net, data, mode):
    batch, val = data(), data()
    plain = net(dropout=0.0)
    plain(batch[0])
    model = net(dropout=0.0)
    meta = rescaling(model, meta_grad=mode, passes=1)
    meta.step(batch, val_batch=val)
    assert equal(plain.buffers(), model.buffers())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(torch.tanh(self.embed(x)))[:, None, None].chunk(3, -1)
        q, k, v = (t.expand(-1, 1, 4, -1) * torch.arange(1, 5)[:, None] for t in (q, k, v))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def test_fused_attention_falls_back_and_gives_the_same_gradient(data):
    batch, val, found = data(), data(), []
    for mode in ("finite_difference", "jvp", "double_backward"):
        torch.manual_seed(0)
        model = Attention().double()
        meta = rescaling(model, meta_grad=mode, passes=1)
        meta.step((batch[0].double(), batch[1]), val_batch=(val[0].double(), val[1]))
        found.append(meta.rescaler.first.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-9)


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class NoForwardRule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(OneWay.apply(self.first(x)))


@pytest.mark.parametrize("mode", ["jvp", "double_backward"])
def test_a_model_that_a_mode_cannot_differentiate_says_what_to_use(data, mode):
    model = NoForwardRule()
    before = weights_of(model)
    with pytest.raises(UsageError, match="use meta_grad='finite_difference'"):
        rescaling(model, meta_grad=mode, passes=1).step(data(), val_batch=data())
    assert equal(before, weights_of(model))
    rescaling(NoForwardRule(), passes=1).step(data(), val_batch=data())


@pytest.mark.parametrize("mode", ["finite_difference", "jvp", "double_backward", "head", "none"])
def test_frozen_parameters_stay(net, data, mode):
    model = net()
    model.body.requires_grad_(False)
    before = weights_of(model.body)
    meta = rescaling(model, meta_grad=mode)
    for _ in range(2):
        meta.step(data(), val_batch=data())
    assert equal(before, weights_of(model.body))
    assert not equal(weights_of(model.head), weights_of(net().head))


def test_weight_decay_is_no_part_of_the_virtual_step(net, data):
    batch, val, found = data(), data(), []
    for decay in (0.0, 10.0):
        model = net(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
        meta = MetaRescaler(model, optimizer, 3, passes=1)
        found.append(meta.step(batch, val_batch=val).meta_loss)
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["finite_difference", "jvp", "double_backward", "head", "none"])
def test_the_virtual_step_is_taken_back_to_the_bit(net, data, mode):
    model = net()
    meta = rescaling(model, meta_grad=mode)
    before = weights_of(model)
    meta.loss(data()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    assert meta.update(data()) is not None
    assert equal(before, weights_of(model))
    assert equal(gradients, [p.grad for p in model.parameters()])


def test_finite_differences_refuse_weights_in_half_precision(net, data):
    model = net(norm=False).bfloat16()
    with pytest.raises(UsageError, match=r"needs weights in float32, got torch.bfloat16.*'jvp', 'head' or 'none'"):
        rescaling(model)
    x, y = data()
    for mode in ("head", "none"):
        assert rescaling(net(norm=False).bfloat16(), meta_grad=mode).step((x.bfloat16(), y)).weights.isfinite().all()


def test_head_refuses_logits_that_are_no_output_of_a_linear_layer(data):
    model = nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(-1))
    with pytest.raises(UsageError, match="come straight out of a trainable linear layer"):
        rescaling(model, meta_grad="head").step(data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes must be a whole number of at least 1, got 0"),
        ({"meta_every": 1.5}, "meta_every must be a whole number"),
        ({"window": -1}, "window must be a whole number of at least 0"),
        ({"meta_grad": "exact"}, "meta_grad must be one of finite_difference, jvp"),
        ({"mode": "both"}, "mode must be one of two_phase, official"),
        ({"normalize": "sum"}, "normalize must be one of none, mean, loss"),
        ({"virtual_lr": 0.0}, "virtual_lr must be above 0, got 0.0"),
        ({"rescaler_lr": float("nan")}, "rescaler_lr must be above 0"),
        ({"meta_gard": "head"}, "option 'meta_gard' is not known: did you mean 'meta_grad'"),
        ({"outer": False, "meta_grad": "none"}, "nothing to learn from"),
        ({"mode": "official", "meta_grad": "head"}, "must not be 'head'"),
        ({"mode": "official", "apply": False}, "apply must be True"),
        ({"inner_steps": 2, "meta_grad": "head"}, "inner_steps must be 1 with"),
    ],
)
def test_bad_options_are_refused(net, options, message):
    with pytest.raises(UsageError, match=message):
        rescaling(net(), **options)


def test_bad_batches_are_refused(net, data):
    x, y = data()
    meta = rescaling(net())
    for batch, message in (
        ((x, y + 5), "labels must be below num_classes, 3"),
        ((x, y.float()), "regression and several labels per sample are not supported"),
        ({"x": x}, "batch must hold labels, it has x"),
        (x, r"batch must be \(inputs, labels\) or a mapping, got Tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            meta.step(batch)
    with pytest.raises(UsageError, match="num_classes is 4, but the logits have 3"):
        rescaling(net(), classes=4).step((x, y))
    with pytest.raises(UsageError, match="ids must be whole numbers"):
        meta.step((x, y), ids=torch.rand(12))
    with pytest.raises(UsageError, match="one loss per sample"):
        rescaling(net(), loss_fn=nn.functional.cross_entropy).step((x, y))


def test_a_step_after_an_error_is_a_step_of_its_own_batch(net, data):
    batch, val, found = data(), data(), []
    for broken in (False, True):
        model = net(dropout=0.0)
        meta = rescaling(model, passes=1, window=0)
        if broken:
            meta.loss(data())  # its backward and update never came
            for part, fresh in zip(model.buffers(), net(dropout=0.0).buffers(), strict=True):
                part.copy_(fresh)
        meta.step(batch, val_batch=val)
        found.append(weights_of(model) + weights_of(meta.rescaler))
    assert equal(*found)


def test_calls_out_of_order_are_refused(net, data):
    meta = rescaling(net())
    with pytest.raises(UsageError, match="before update"):
        meta.update()
    meta.loss(data())
    with pytest.raises(UsageError, match="call backward on the loss"):
        meta.update()


def test_parts_that_do_not_fit_are_refused(net):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(UsageError, match="rescaler must take 2 features"):
        MetaRescaler(model, optimizer, LossRescaler(3), features="loss")
    with pytest.raises(UsageError, match="a LossRescaler or the number of classes, got Linear"):
        MetaRescaler(model, optimizer, nn.Linear(19, 1))
    with pytest.raises(UsageError, match="no trainable parameter"):
        MetaRescaler(model.requires_grad_(False), optimizer, 3)
    for call, message in (
        (lambda: LossRescaler(1), "num_classes must be at least 2"),
        (lambda: LossRescaler(2, 0), "n_features must be at least 1"),
        (lambda: LossRescaler(2, binary=1.0), "binary must be between 0 and 1"),
        (lambda: LossRescaler(2)(torch.zeros(1, 19), torch.zeros(1).long()), "B of at least 2"),
        (lambda: SampleStatsMemory(1), "num_classes must be at least 2"),
        (lambda: SampleStatsMemory(2, -1), "window must be 0 or more"),
        (lambda: SampleStatsMemory(2, 1, 0), "batch_size must be at least 1"),
        (lambda: RandomBatches([], 2), "it is empty"),
        (lambda: RandomBatches([1], 0), "batch_size must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_finite_differences_refuse_a_frozen_body_in_half_precision(net):
    model = net(norm=False)
    model.body.to(torch.bfloat16).requires_grad_(False)
    optimizer = torch.optim.Adam(model.head.parameters())
    with pytest.raises(UsageError, match=r"needs weights in float32, got torch\.bfloat16"):
        MetaRescaler(model, optimizer, 3)
    MetaRescaler(model, optimizer, 3, meta_grad="jvp")


@pytest.mark.parametrize("ids", [torch.arange(40), torch.arange(4), torch.ones(12, dtype=torch.bool)])
def test_identifiers_that_do_not_name_every_sample_are_refused(net, data, ids):
    model = net()
    meta = MetaRescaler(model, torch.optim.Adam(model.parameters()), 3)
    with pytest.raises(UsageError, match="ids must"):
        meta.step(data(), ids=ids)


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.weight, self.bias)


@pytest.mark.parametrize("kind", ["subclass", "changed in place", "weight norm"])
def test_head_refuses_a_layer_whose_derivative_is_another_one(net, data, kind):
    model = net()
    if kind == "subclass":
        model.head = Cosine(16, 3)
    if kind == "weight norm":
        model.head = nn.utils.parametrizations.weight_norm(model.head)
    cooled = (lambda z: z.div_(0.25)) if kind == "changed in place" else (lambda z: z)
    meta = MetaRescaler(
        model, torch.optim.Adam(model.parameters()), 3, lambda m, batch: (cooled(m(batch[0])), batch[1]),
        meta_grad="head",
    )  # fmt: skip
    with pytest.raises(UsageError, match="straight out of a trainable linear layer"):
        meta.loss(data())


def test_head_follows_a_layer_that_is_called_by_keyword(net, data):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(input=x)

    model = Named()
    meta = MetaRescaler(model, torch.optim.Adam(model.parameters()), 3, meta_grad="head", passes=1)
    assert meta.step(data()).meta_loss is not None


def test_dropout_that_is_always_on_is_no_part_of_a_finite_difference():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4).double(), torch.randn(5, 8, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in layer.parameters()]

    def losses():
        return nn.functional.dropout(layer(x), 0.5).square().sum(1)

    found = []
    for mode in ("finite_difference", "jvp"):
        torch.manual_seed(3)
        found.append(directional_derivatives(losses, layer, direction, mode))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
