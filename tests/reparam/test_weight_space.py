import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.testing import assert_close

from weightsmith import fold_
from weightsmith.core.errors import WeightsmithWarning
from weightsmith.optim import AdamP
from weightsmith.reparam import InWeightSpace, add_weight_decay_grad_, compand_, param_groups


def small(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, decay: float = 0.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x, y = (torch.randn(8, n, generator=generator, dtype=dtype) for n in (5, 2))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if decay:
            add_weight_decay_grad_(model, decay)
        optimizer.step()


def make_optimizer(model: nn.Module, setting: dict) -> torch.optim.Optimizer:
    mode, lr, decay = setting["mode"], setting["lr"], setting["weight_decay"]
    parameters = list(model.parameters())
    if mode.startswith("sgd"):
        return SGD(param_groups(model, decay), lr, momentum=setting["momentum"])
    if mode == "adam_plain":
        return Adam(parameters, lr)
    if mode == "adam_modified":
        return InWeightSpace(Adam(parameters, lr), model)
    if mode == "adamw_modified_decoupled":
        return InWeightSpace(AdamW(parameters, lr, weight_decay=decay), model)
    return InWeightSpace(
        AdamP(parameters, lr, weight_decay=decay, delta=setting["delta"], wd_ratio=setting["wd_ratio"]), model
    )


@pytest.mark.parametrize(
    "case",
    [
        "traj_sgd_fixed",
        "traj_sgd_fixed_erf",
        "traj_sgd_learnable",
        "traj_adam_plain",
        "traj_adam_modified",
        "traj_adamw_modified_decoupled",
        "traj_adamp_wspace",
    ],
)
def test_training_follows_the_reference_step_by_step(golden, case) -> None:
    tensors, setting = golden(case)
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    model.weight.data.copy_(tensors["w_init"])
    compand_(model, setting["a"], setting["b"], fn=setting["fn"], learnable=setting["mode"] == "sgd_learnable")
    assert_close(original(model).detach(), tensors["v_init"], rtol=1e-12, atol=1e-12)
    optimizer = make_optimizer(model, setting)
    compander = model.parametrizations.weight[0]
    exact = {"rtol": 1e-10, "atol": 1e-10}
    for step in range(setting["steps"]):
        optimizer.zero_grad()
        loss = (model(tensors["x"]) - tensors["y"]).square().sum() / 32
        assert_close(loss.detach(), tensors["loss"][step], **exact)
        loss.backward()
        if setting["mode"] == "sgd_fixed":
            add_weight_decay_grad_(model, setting["weight_decay"], optimizer=optimizer)
        optimizer.step()
        assert_close(original(model).detach(), tensors["v"][step], **exact)
        if "ab" in tensors:
            assert_close(torch.stack([compander.a, compander.b]).detach(), tensors["ab"][step], **exact)
    assert_close(fold_(model).weight.detach(), tensors["w_final"], **exact)


def test_decay_on_the_weight_is_scaled_by_the_slope(golden) -> None:
    tensors, setting = golden("decay")
    layer = compand_(nn.Linear(5, 4, dtype=torch.float64), setting["a"], setting["b"])
    original(layer).data.copy_(tensors["v"])
    original(layer).grad = torch.zeros_like(tensors["v"])
    assert add_weight_decay_grad_(layer, setting["weight_decay"]) is layer
    assert_close(original(layer).grad, tensors["l2_grad_v"], rtol=1e-12, atol=1e-12)


def test_decay_passes_by_learned_pairs_and_weights_without_gradient() -> None:
    learned, unused = compand_(nn.Linear(2, 2), learnable=True), compand_(nn.Linear(2, 2))
    original(learned).grad = torch.zeros(2, 2)
    add_weight_decay_grad_(learned, 0.1)
    add_weight_decay_grad_(unused, 0.1)
    assert not original(learned).grad.any()
    assert original(unused).grad is None


def test_decay_given_twice_is_warned_about() -> None:
    layer = compand_(nn.Linear(2, 2))
    original(layer).grad = torch.zeros(2, 2)
    with pytest.warns(WeightsmithWarning, match="weight_decay acts on weight too"):
        add_weight_decay_grad_(layer, 0.1, optimizer=SGD(layer.parameters(), 0.1, weight_decay=0.1))
    add_weight_decay_grad_(layer, 0.1, optimizer=SGD(param_groups(layer, 0.1), 0.1))


def test_parameter_groups_decay_what_the_paper_decays() -> None:
    def decays(model: nn.Module) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = param_groups(model, 0.1, momentum=0.9)
        assert all(group["momentum"] == 0.9 for group in groups)
        return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}

    model = nn.Sequential(nn.Linear(2, 2))
    assert decays(compand_(copy.deepcopy(model))) == {"0.bias": 0.1, "0.parametrizations.weight.original": 0.0}
    assert decays(compand_(model, learnable=True)) == {
        "0.bias": 0.1,
        "0.parametrizations.weight.original": 0.1,
        "0.parametrizations.weight.0.a": 0.0,
        "0.parametrizations.weight.0.b": 0.0,
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_b_is_nothing_but_a_learning_rate_multiplier(wrapped) -> None:
    def run(b: float, lr: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = compand_(nn.Linear(5, 2, bias=False, dtype=torch.float64), 0.7, b)
        optimizer: torch.optim.Optimizer = SGD(model.parameters(), lr, momentum=0.9)
        if wrapped:
            optimizer = InWeightSpace(Adam(model.parameters(), lr), model)
        train(model, optimizer, 50, decay=0.0 if wrapped else 0.01)
        return model.weight.detach()

    assert_close(run(0.5, 0.05), run(1.0, 0.2), rtol=1e-12, atol=1e-12)


def test_before_batch_norm_the_loss_does_not_depend_on_a() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=1e-20), nn.Flatten(), nn.Linear(16, 1)).double()
    compand_(model, 0.6, 0.9, learnable=True)
    model(torch.randn(8, 2, 4, 4, dtype=torch.float64)).square().sum().backward()
    first, last = (model[index].parametrizations.weight[0] for index in (0, 3))
    assert abs(first.a.grad) < 1e-10
    assert abs(first.b.grad) > 1e-6
    assert abs(last.a.grad) > 1e-6


def test_near_zero_a_step_on_v_is_a_step_on_w_with_the_squared_slope() -> None:
    companded, plain = nn.Linear(5, 2, dtype=torch.float64), nn.Linear(5, 2, dtype=torch.float64)
    companded.weight.data.mul_(1e-4)
    plain.load_state_dict(companded.state_dict())
    compand_(companded, 1.0, 0.5)
    train(companded, SGD(companded.parameters(), 1e-5), 1)
    train(plain, SGD([{"params": [plain.weight], "lr": 4e-5}, {"params": [plain.bias]}], 1e-5), 1)
    assert_close(companded.weight, plain.weight, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.1, momentum=0.9),
        lambda p: AdamW(p, 0.01, weight_decay=0.1),
        lambda p: AdamW(p, 0.01, weight_decay=0.1, fused=True),
        lambda p: AdamP(p, 0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw", "adamw-fused", "adamp"],
)
@pytest.mark.parametrize("learnable", [False, True])
def test_saving_loading_and_continuing_equals_never_having_stopped(make: Callable, learnable) -> None:
    straight = compand_(small(), learnable=learnable)
    resumed = compand_(small(), learnable=learnable)
    optimizer = InWeightSpace(make(straight.parameters()), straight)
    train(straight, optimizer, 3)
    resumed.load_state_dict(straight.state_dict())
    restored = InWeightSpace(make(resumed.parameters()), resumed)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 3, seed=1)
    train(resumed, restored, 3, seed=1)
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_it_is_an_optimizer_to_schedulers_and_keeps_its_groups() -> None:
    model = compand_(small())
    optimizer = InWeightSpace(SGD(model.parameters(), 0.4), model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.defaults["lr"] == 0.4
    extra = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert optimizer.optimizer.param_groups[1]["params"] == [extra]
    assert "lr: 1.0" in repr(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.optimizer.param_groups


def test_a_model_and_its_optimizer_can_be_copied_together() -> None:
    model = compand_(small())
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.01), model)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, seed=1)
    train(twin, twin_optimizer, 2, seed=1)
    assert torch.equal(twin[0].weight, model[0].weight)


def test_a_closure_is_called_once_and_sees_the_companded_model() -> None:
    model = compand_(small())
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.01), model)
    x, seen = torch.randn(3, 5, dtype=torch.float64), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        seen.append(loss.detach())
        return loss

    expected = model(x).square().sum().detach()
    assert_close(optimizer.step(closure).detach(), expected)
    assert len(seen) == 1


def test_weights_without_a_gradient_do_not_move_and_gradients_are_put_back() -> None:
    model = compand_(small())
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.01, weight_decay=0.1), model)
    still, moving = original(model[0]), original(model[2])
    before = still.detach().clone()
    moving.grad = gradient = torch.ones_like(moving)
    optimizer.step()
    assert torch.equal(still, before)
    assert moving.grad is gradient
    assert torch.equal(gradient, torch.ones_like(moving))


@pytest.mark.parametrize("fn", ["arctan", "erf"])
def test_saturated_weights_neither_move_nor_turn_into_nan(fn) -> None:
    model = compand_(nn.Linear(2, 2), fn=fn)
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.1, weight_decay=0.1), model)
    original(model).data.fill_(1e30)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(original(model).detach(), torch.full((2, 2), 1e30))


def test_tied_weights_are_stepped_once() -> None:
    def run(tie: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"one": nn.Linear(3, 3, bias=False), "two": nn.Linear(3, 3, bias=False)})
        if tie:
            model["two"].weight = model["one"].weight
        compand_(model)
        optimizer = InWeightSpace(SGD(model.parameters(), 0.1), model)
        model["one"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model["one"].weight.detach()

    assert_close(run(tie=True), run(tie=False))


def test_folding_under_the_optimizer_leaves_an_ordinary_one() -> None:
    model, plain = compand_(small()), small()
    optimizer = InWeightSpace(SGD(model.parameters(), 0.1), model)
    plain.load_state_dict(fold_(model).state_dict())
    train(model, optimizer, 2)
    train(plain, SGD(plain.parameters(), 0.1), 2)
    assert_close(model[0].weight, plain[0].weight)


def test_a_step_that_fails_leaves_the_model_companded_as_it_was() -> None:
    class Failing(SGD):
        def step(self, closure: object = None) -> None:
            raise RuntimeError("no step today")

    model = compand_(small())
    optimizer = InWeightSpace(Failing(model.parameters(), 0.1), model)
    before = original(model[0]).detach().clone()
    with pytest.raises(RuntimeError, match="no step today"):
        train(model, optimizer, 1)
    assert torch.equal(original(model[0]), before)


def test_a_gradient_scaler_skips_overflown_steps_and_unscales_the_rest() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = compand_(small(torch.float32))
    plain = copy.deepcopy(model)
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.01, fused=True), model)
    reference = InWeightSpace(AdamW(plain.parameters(), 0.01), plain)
    x = torch.randn(3, 5)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            reference.zero_grad()
            plain(x).square().mean().backward()
            reference.step()
    assert_close(model[0].weight, plain[0].weight)


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = compand_(small(torch.float32))
    plain = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, InWeightSpace(AdamW(model.parameters(), 0.01), model))
    reference = InWeightSpace(AdamW(plain.parameters(), 0.01), plain)
    x = torch.randn(3, 5)
    for _ in range(3):
        for net, opt, backward in (
            (prepared, optimizer, accelerator.backward),
            (plain, reference, torch.Tensor.backward),
        ):
            opt.zero_grad()
            backward(net(x).square().mean())
            opt.step()
    assert_close(accelerator.unwrap_model(prepared)[0].weight, plain[0].weight)


def test_distributed_data_parallel_sees_ordinary_parameters(tmp_path) -> None:
    model = compand_(small(), learnable=True)
    plain = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        train(wrapped, InWeightSpace(AdamW(wrapped.parameters(), 0.01), wrapped), 3)
    finally:
        torch.distributed.destroy_process_group()
    train(plain, InWeightSpace(AdamW(plain.parameters(), 0.01), plain), 3)
    assert_close(model[0].weight, plain[0].weight)


def test_half_precision_weights_are_stepped() -> None:
    model = compand_(nn.Linear(4, 4, dtype=torch.bfloat16))
    optimizer = InWeightSpace(AdamW(model.parameters(), 0.05), model)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert (model.weight < before).all()


def test_optimizers_that_cannot_work_are_refused() -> None:
    model = compand_(small())
    with pytest.raises(TypeError, match="LBFGS"):
        InWeightSpace(torch.optim.LBFGS(model.parameters()), model)
    plain = small()
    with pytest.raises(ValueError, match="holds no companded weight"):
        InWeightSpace(SGD(plain.parameters(), 0.1), plain)


@pytest.mark.parametrize(("a", "b"), [(-0.5, 1.0), (0.5, -1.0), (-0.5, -1.0)])
def test_a_learned_pair_that_has_crossed_zero_is_stepped_by_its_negative_slope(a, b) -> None:
    layer = compand_(nn.Linear(3, 2, bias=False).double(), 0.5, 1.0, learnable=True)
    compander = layer.parametrizations.weight[0]
    with torch.no_grad():
        compander.a.fill_(a)
        compander.b.fill_(b)
    v, w = original(layer).detach().clone(), layer.weight.detach().clone()
    optimizer = InWeightSpace(SGD([original(layer)], lr=0.1), layer)
    (layer.weight.square().sum() / 2).backward()
    optimizer.step()
    assert_close(original(layer).detach(), v - 0.1 * compander.derivative(v) * w)
