"""The optimizers in the company they keep: closures, schedulers, scalers, groups, compile, distributed tensors."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from weightsmith.optim import SGDP, AdamP, param_groups

BOTH = pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
FORMS = pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}], ids=str)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.arange(8) % 3


def loss_of(model):
    x, y = data()
    return nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, steps=5, before_step=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        before_step()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@BOTH
def test_a_closure_is_called_with_gradients_and_its_loss_returned(optimizer_class):
    model = network()
    optimizer = optimizer_class(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


@BOTH
def test_every_form_of_the_step_gives_the_same_weights(optimizer_class):
    runs = []
    for options in ({}, {"foreach": True}, {"foreach": False}, {"capturable": True}):
        model = network()
        runs.append(train(model, optimizer_class(model.parameters(), lr=0.01, weight_decay=0.1, **options)))
    for run in runs[1:]:
        assert_same(run, runs[0], rtol=1e-4, atol=1e-6)


@FORMS
@BOTH
def test_maximising_the_negative_is_minimizing(optimizer_class, options):
    down, up = network(), network()
    want = train(down, optimizer_class(down.parameters(), **options))

    def negate():
        for p in up.parameters():
            p.grad.neg_()

    assert_same(train(up, optimizer_class(up.parameters(), maximize=True, **options), before_step=negate), want)


@FORMS
@BOTH
def test_a_tensor_learning_rate_equals_a_float(optimizer_class, options):
    first, second = network(), network()
    want = train(first, optimizer_class(first.parameters(), lr=0.01, weight_decay=0.1, **options))
    lr = torch.tensor(0.01)
    assert_same(train(second, optimizer_class(second.parameters(), lr=lr, weight_decay=0.1, **options)), want)


@BOTH
def test_a_scheduler_moves_the_learning_rate(optimizer_class):
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=1.0, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1e-3)
    start = train(model, optimizer, steps=1)
    scheduler.step()
    assert_same(train(model, optimizer, steps=2), start, rtol=0, atol=0)


@BOTH
def test_every_option_can_differ_per_group(optimizer_class):
    model = network()
    conv, rest = [model[0].weight], [*model[1].parameters(), *model[3].parameters()]
    options = {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.3, "delta": 0.0, "wd_ratio": 0.5, "nesterov": True}
    optimizer = optimizer_class([{"params": conv, **options}, {"params": rest, "maximize": True, "foreach": True}])
    train(model, optimizer, steps=2)
    first, second = optimizer.projection_stats()
    assert (first.channel, first.layer, first.none) == (0, 0, 1)
    assert second.channel + second.layer + second.none == 1


def test_positional_arguments_keep_the_official_order():
    params = [nn.Parameter(torch.zeros(2, 2))]
    adam = AdamP(params, 0.1, (0.8, 0.9), 1e-6, 0.2, 0.3, 0.4, True).param_groups[0]
    names = ("lr", "betas", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")
    assert [adam[name] for name in names] == [0.1, (0.8, 0.9), 1e-6, 0.2, 0.3, 0.4, True]
    sgd = SGDP(params, 0.1, 0.9, 0.2, 0.3, True, 1e-6, 0.4, 0.5).param_groups[0]
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "eps", "delta", "wd_ratio")
    assert [sgd[name] for name in names] == [0.1, 0.9, 0.2, 0.3, True, 1e-6, 0.4, 0.5]


@BOTH
def test_a_gradient_scaler_unscales_first_and_skips_steps_that_overflow(optimizer_class):
    plain, scaled = network(), network()
    want = train(plain, optimizer_class(plain.parameters()), steps=1)
    optimizer = optimizer_class(scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(scaled)).backward()
    scaler.step(optimizer)
    assert_same([p.detach() for p in scaled.parameters()], want, rtol=1e-4, atol=1e-6)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(loss_of(scaled) * torch.inf).backward()
    scaler.step(optimizer)
    assert_same([p.detach() for p in scaled.parameters()], want, rtol=1e-4, atol=1e-6)


@FORMS
@BOTH
def test_a_group_may_mix_precisions(optimizer_class, options):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    values = [torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4) for dtype in dtypes]
    mixed, alone = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizers = [optimizer_class(mixed, **options), *(optimizer_class([p], **options) for p in alone)]
    for p in (*mixed, *alone):
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(mixed, alone)


def test_statistics_tell_counts_and_norm():
    model = network()
    optimizer = AdamP(model.parameters())
    before = optimizer.projection_stats()[0]
    assert (before.channel, before.layer, before.none) == (0, 0, 0)
    train(model, optimizer, steps=1)
    stats = optimizer.projection_stats()[0]
    assert stats.channel + stats.layer + stats.none == 2  # convolution and linear; vectors are not counted
    norms = (model[0].weight.norm().item(), model[3].weight.norm().item())
    assert stats.mean_norm == pytest.approx(sum(norms) / 2)


def test_param_groups_decay_matrices_only_and_take_each_parameter_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    decayed, free = param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert (decayed["weight_decay"], free["weight_decay"], len(free["params"])) == (0.1, 0.0, 3)
    assert len(param_groups(nn.Linear(3, 3, bias=False), 0.1)) == 1


@pytest.mark.slow
@BOTH
def test_a_compiled_step_equals_the_eager_one(optimizer_class):
    eager, compiled = network(), network()
    want = train(eager, optimizer_class(eager.parameters(), lr=0.01, weight_decay=0.1))
    optimizer = optimizer_class(compiled.parameters(), lr=0.01, weight_decay=0.1, capturable=True)
    step = torch.compile(optimizer.step)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(compiled).backward()
        step()
    assert_same([p.detach() for p in compiled.parameters()], want, rtol=1e-4, atol=1e-6)
    assert optimizer.projection_stats()[0].none + optimizer.projection_stats()[0].channel >= 1


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@BOTH
def test_a_distributed_tensor_moves_as_a_local_one(optimizer_class, placement, mesh):
    torch.manual_seed(0)
    w, b = torch.randn(4, 5), torch.randn(4)
    local = [nn.Parameter(w.clone()), nn.Parameter(b.clone())]
    spread = [nn.Parameter(distribute_tensor(t.clone(), mesh, [placement])) for t in (w, b)]
    ours, theirs = optimizer_class(local, weight_decay=0.1), optimizer_class(spread, weight_decay=0.1)
    for scale in (1.0, 0.0):
        for p, q in zip(local, spread, strict=True):
            p.grad = torch.full_like(p, scale)
            q.grad = distribute_tensor(p.grad.clone(), mesh, [placement])
        ours.step()
        theirs.step()
        (got,), (want,) = theirs.projection_stats(), ours.projection_stats()
        assert (got.channel, got.layer, got.none) == (want.channel, want.layer, want.none)
    assert_same([q.full_tensor().detach() for q in spread], [p.detach() for p in local])
