"""In people's own loops: any classifier, precision, accumulation, several processes, and resuming."""

import collections
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.reweight import LossRescaler, MetaRescaler, RandomBatches
from weightsmith.reweight.meta_gradient import meta_gradient

MODES = ["finite_difference", "jvp", "double_backward", "head", "none"]
each_mode = pytest.mark.parametrize("mode", MODES)


def make(model, optimizer=torch.optim.SGD, lr=0.1, classes=3, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    return MetaRescaler(model, optimizer(trained, lr=lr), classes, **({"passes": 2} | options))


def weights_of(*modules):
    return [value.detach().clone() for module in modules for value in module.parameters()]


def equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@each_mode
def test_it_learns_which_labels_are_wrong(net, mode):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(3, (360,), generator=generator)
    x = 3 * torch.eye(6)[y] + torch.randn(360, 6, generator=generator)
    wrong = torch.rand(360, generator=generator) < 0.3
    given = torch.where(wrong, (y + 1 + (torch.rand(360, generator=generator) < 0.5)) % 3, y)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rescaler = LossRescaler(3, class_separation=False)
    sampler = RandomBatches(list(zip(x, given, strict=True)), 40)
    meta = MetaRescaler(model, optimizer, rescaler, passes=2, meta_grad=mode, val_sampler=sampler)
    for _ in range(15):
        meta.start_epoch()
        for rows in torch.randperm(360, generator=generator).split(40):
            meta.step((x[rows], given[rows]), ids=rows)
    w = torch.tensor([meta.weights_by_id[i] for i in range(360)])
    ranks = w.argsort().argsort().double()
    auc = (ranks[~wrong].mean() - ranks[wrong].mean()) / 360 + 0.5
    assert auc > 0.85
    table = meta.audit()
    assert wrong[torch.tensor(table.index[:40])].float().mean() > 0.7
    issues = table.issues()
    assert 0 < len(issues) < 360
    suggested = torch.tensor(issues.predicted_label) == y[torch.tensor(issues.index)]
    assert suggested.float().mean() > 0.7


@each_mode
def test_a_step_is_loss_backward_update_and_the_optimizers_step(net, data, mode):
    batch, val, found = data(), data(), []
    for whole in (True, False):
        model = net()
        meta = make(model, meta_grad=mode)
        torch.manual_seed(5)
        if whole:
            meta.step(batch, val_batch=val)
        else:
            meta.optimizer.zero_grad()
            meta.loss(batch).backward()
            meta.update(val)
            meta.optimizer.step()
        found.append(weights_of(model, meta.rescaler))
    assert equal(*found)


def test_the_model_trains_on_the_weighted_mean(net, data):
    x, y = data()
    model, plain = net(dropout=0.0), net(dropout=0.0)
    meta = make(model, passes=1, normalize="none")
    result = meta.step((x, y))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    losses = nn.functional.cross_entropy(plain(x), y, reduction="none")
    torch.testing.assert_close(losses.detach(), result.losses)
    (result.weights * losses).mean().backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_applying_it_trains_as_if_it_were_not_there_but_learns(net, data):
    x, y = data()
    model, plain = net(dropout=0.0), net(dropout=0.0)
    meta = make(model, passes=1, apply=False)
    before = weights_of(meta.rescaler)
    meta.step((x, y))
    nn.functional.cross_entropy(plain(x), y).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not equal(before, weights_of(meta.rescaler))


@pytest.mark.parametrize("mode", ["finite_difference", "jvp", "double_backward"])
@pytest.mark.parametrize(("inner", "apply"), [(1, True), (2, True), (3, True), (1, False), (2, False)])
def test_several_virtual_steps_equal_differentiating_through_all_of_them(data, mode, inner, apply):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    options = {"passes": 1, "outer": False, "normalize": "none", "virtual_lr": 0.7}
    meta = make(model, meta_grad=mode, inner_steps=inner, apply=apply, **options)
    (x, y), (x_val, y_val) = data(dtype=torch.float64), data(dtype=torch.float64)
    names, theta = zip(*model.named_parameters(), strict=True)

    def losses(values, x, y):
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.cross_entropy(out, y, reduction="none")

    other = make(model, **options)
    w = other._observer.look((x, y), "training").weights
    dw = meta_gradient(
        lambda t: losses(t, x, y) / 12, lambda t: losses(t, x_val, y_val).mean(), w, theta, 0.7, steps=inner
    )
    assert dw.abs().max() > 1e-4
    wanted = torch.autograd.grad(w, list(other.rescaler.parameters()), dw)
    meta.loss((x, y)).backward()
    meta.update((x_val, y_val))
    for ours, reference in zip(meta.rescaler.parameters(), wanted, strict=True):
        torch.testing.assert_close(ours.grad, reference, rtol=1e-5, atol=1e-9)


def test_the_rescaler_learns_at_every_nth_step_only(net, data):
    meta = make(net(), meta_every=3)
    done = [meta.step(data()).meta_loss is not None for _ in range(7)]
    assert done == [True, False, False, True, False, False, True]


@each_mode
def test_accumulating_equal_batches_is_one_batch_of_their_mean(net, data, mode):
    batch, val, found = data(), data(), []
    for pieces in (1, 2):
        model = net(dropout=0.0)
        meta = make(model, meta_grad=mode, passes=1, window=0)
        for _ in range(pieces):
            (meta.loss(batch) / pieces).backward()
        meta.update(val)
        found.append([p.grad for p in meta.rescaler.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@each_mode
def test_autocast_gives_nearly_the_gradients_of_full_precision(net, data, mode):
    batch, val, found = data(32), data(32), []
    for half in (False, True):
        model = net(dropout=0.0)
        meta = make(model, meta_grad=mode, passes=2, lr=0.5, normalize="none")
        meta._observer._varies = True
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            meta.step(batch, val_batch=val)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        found.append(torch.cat([p.grad.flatten() for p in [*meta.rescaler.parameters(), *model.parameters()]]))
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9


def test_a_pass_without_gradients_under_autocast_does_not_cut_off_those_with(net, data):
    model = net()
    meta = make(model, passes=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meta.step(data())
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_scale_is_undone(net, data):
    batch, val, found = data(), data(), []
    for scale in (1.0, 1024.0):
        meta = make(net(dropout=0.0), passes=1)
        (scale * meta.loss(batch)).backward()
        meta.update(val, scale=scale)
        found.append([p.grad for p in meta.rescaler.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_overflowed_gradients_teach_nothing(net, data):
    model = net()
    meta = make(model)
    before = weights_of(model, meta.rescaler)
    meta.loss(data()).backward()
    model.head.weight.grad[0, 0] = float("inf")
    assert meta.update(data()) is None
    assert equal(before, weights_of(model, meta.rescaler))


def test_official_mode_keeps_the_virtual_step_and_leaves_the_optimizer_nothing(net, data):
    model, batch = net(dropout=0.0), data()
    meta = make(model, mode="official", passes=1, lr=0.01, clamp=None)
    before = weights_of(model)
    meta.loss(batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    meta.update(data())
    assert all(p.grad is None for p in model.parameters())
    meta.optimizer.step()
    for p, start, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.01 * g / (g.abs() + 3.1622776e-7), rtol=1e-4, atol=1e-6)


class TiedClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return {"logits": self.head(torch.tanh(self.body(self.embed(tokens).mean(1))))}


@each_mode
def test_tied_weights_are_moved_once_and_stay_tied(mode):
    torch.manual_seed(0)
    model = TiedClassifier()
    meta = make(model, meta_grad=mode, passes=1)
    batch = {"tokens": torch.randint(3, (8, 4)), "labels": torch.arange(8) % 3}
    before = weights_of(model)
    meta.loss(batch).backward()
    meta.update(batch)
    assert equal(before, weights_of(model))
    assert model.head.weight is model.embed.weight
    meta.optimizer.step()
    assert not equal(before, weights_of(model))


SMALL = {"num_labels": 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES = {
    "BertForSequenceClassification": {"vocab_size": 20, "max_position_embeddings": 16},
    "RobertaForSequenceClassification": {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0},
    "DistilBertForSequenceClassification": {"vocab_size": 20, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
    "LlamaForSequenceClassification": {"vocab_size": 20, "pad_token_id": 0},
    "ViTForImageClassification": {"image_size": 8, "patch_size": 4, "num_channels": 1},
    "ConvNextForImageClassification": {"num_channels": 1, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
    "ResNetForImageClassification": {
        "num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["finite_difference", "head", "none"])
def test_models_of_transformers_train(name, mode):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    options = {**SMALL, **FAMILIES[name]}
    if name.startswith("DistilBert"):
        options = {**FAMILIES[name], "num_labels": 3}
    model = kind(kind.config_class(**options)).train()
    if "Image" in name:
        batch = {"pixel_values": torch.randn(6, 1, 32 if "ViT" not in name else 8, 32 if "ViT" not in name else 8)}
    else:
        batch = {"input_ids": torch.randint(1, 20, (6, 8)), "attention_mask": torch.ones(6, 8, dtype=torch.int64)}
    batch["labels"] = torch.arange(6) % 3
    if mode == "head" and name.startswith("Llama"):  # it picks the logits of one token afterwards
        pytest.skip("its logits are no output of a linear layer, which is refused in words")
    meta = make(model, optimizer=torch.optim.AdamW, lr=1e-3, meta_grad=mode, passes=1)
    before = weights_of(model, meta.rescaler)
    for _ in range(2):
        result = meta.step(batch)
    assert result.weights.isfinite().all()
    assert not equal(before, weights_of(model, meta.rescaler))


@pytest.mark.parametrize("sampler", [True, False])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(net, data, tmp_path, sampler):
    batches = [data() for _ in range(6)]
    pool = [(x, y) for batch in batches for x, y in zip(*batch, strict=True)]

    def start():
        model = net()
        draw = RandomBatches(pool, 12, seed=4) if sampler else None
        meta = make(model, optimizer=torch.optim.Adam, lr=0.01, meta_every=2, val_sampler=draw, window=2)
        return model, meta

    def train(meta, some, first):
        for number, batch in enumerate(some, first):
            torch.manual_seed(number)
            meta.step(batch, ids=torch.arange(12) + 12 * number)

    model, meta = start()
    train(meta, batches, 0)
    half, other = start()
    train(other, batches[:3], 0)
    state = {"model": half.state_dict(), "optimizer": other.optimizer.state_dict(), "meta": other.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    train(other, batches[:2], 0)  # what was saved is no part of what goes on
    again, resumed = start()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["meta"])
    train(resumed, batches[3:], 3)
    assert equal(weights_of(model, meta.rescaler), weights_of(again, resumed.rescaler))
    assert equal(model.buffers(), again.buffers())
    assert meta.weights_by_id == resumed.weights_by_id


def test_a_state_of_other_classes_is_refused_and_changes_nothing(net):
    from weightsmith.core.errors import UsageError

    meta, other = make(net()), make(net(classes=4), classes=4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UsageError, match="the same number of classes"):
        other.load_state_dict(meta.state_dict())
    assert torch.equal(before["rescaler"]["first"], other.rescaler.first)


def test_epochs_forget_recent_samples_and_are_counted(net, data):
    meta = make(net())
    meta.start_epoch()
    meta.step(data(), ids=torch.arange(12))
    meta.start_epoch()
    assert meta._observer.memories["training"]._values is None
    meta.step(data(), ids=torch.arange(6, 18))
    epochs = dict(zip(meta.audit().index, meta.audit().epoch, strict=True))
    assert [epochs[i] for i in (0, 5, 6, 17)] == [0, 0, 1, 1]


SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from weightsmith.reweight import MetaRescaler

def start(wrap, compiled=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    outer = DistributedDataParallel(model) if wrap else model
    outer = torch.compile(outer, backend="eager") if compiled else outer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, MetaRescaler(outer, optimizer, 3, passes=1, meta_grad=mode, normalize="none", features="loss")

dist.init_process_group("gloo")
rank = dist.get_rank()
g = torch.Generator().manual_seed(rank)
for mode, compiled in (("finite_difference", False), ("finite_difference", True), ("head", False), ("none", False)):
    model, meta = start(True, compiled)
    for _ in range(3):
        x, y = torch.randn(6, 6, generator=g).double(), torch.randint(3, (6,), generator=g)
        meta.step((x, y))
    one = torch.randn(1, 6).double(), torch.zeros(1, dtype=torch.int64)
    meta.step(one if rank else (x, y))  # a rank whose batch teaches nothing
    for p in [*model.parameters(), *meta.rescaler.parameters()]:
        both = [torch.zeros_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both), mode
    # the same batch on both ranks is that batch on one
    x, y = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)).double(), torch.arange(6) % 3
    found = []
    for wrap in (True, False):
        model, meta = start(wrap)
        meta.step((x, y), val_batch=(x, y))
        found.append([*model.parameters(), *meta.rescaler.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
print("done", rank)
dist.destroy_process_group()
"""


def test_two_processes_agree_and_equal_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2


def test_the_autocast_that_accelerate_puts_into_a_model_is_off_for_finite_differences(net, data):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    from weightsmith.reweight.passes import repeatable

    seen = []
    model = net()
    model.head.register_forward_hook(lambda layer, inputs, out: seen.append(out.dtype))
    AcceleratorState._reset_state()
    try:
        prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        x = data()[0]
        prepared(x)
        with repeatable(prepared):
            prepared(x)
        prepared(x)
        meta = make(prepared)
        assert meta.step(data()).meta_loss.isfinite()
    finally:
        AcceleratorState._reset_state()
    assert seen[:3] == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_a_repeatable_pass_normalizes_as_the_trained_one_does(norm):
    from weightsmith.reweight.passes import repeatable

    torch.manual_seed(0)
    model = nn.Sequential(norm(2, track_running_stats=True), nn.Dropout(0.0)).train()
    x = torch.randn(3, 2, 5) * 3 + 1
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with repeatable(model):
        repeated = model(x)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    torch.testing.assert_close(repeated, model(x))


@pytest.mark.parametrize("mode", ["finite_difference", "double_backward", "none"])
def test_a_compiled_model_gives_the_step_of_the_plain_one(net, data, mode):
    batch, val, found = data(), data(), []
    for compiled in (False, True):
        model = net(dropout=0.0)
        wrapped = torch.compile(model, backend="aot_eager" if mode != "double_backward" else "eager")
        meta = make(wrapped if compiled else model, meta_grad=mode, passes=1)
        for _ in range(2):
            meta.step(batch, val_batch=val)
        found.append(weights_of(model, meta.rescaler))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-4)


def test_a_grad_scaler_scales_the_real_step_only(net, data):
    batch, val, found = data(), data(), []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = net(dropout=0.0)
        meta = make(model, passes=1)
        meta.step(batch, val_batch=val, scaler=scaler)
        found.append(weights_of(model, meta.rescaler))
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)


def test_clean_validation_data_teach_without_weights_of_their_own(net, data):
    clean = data(60, wrong=0.0)
    draw = RandomBatches(list(zip(*clean, strict=True)), 12)
    meta = make(net(), outer=False, val_sampler=draw)
    before = weights_of(meta.rescaler)
    meta.step(data())
    assert meta._observer.memories["validation"]._values is not None
    assert not equal(before, weights_of(meta.rescaler))


def test_an_own_loss_and_an_own_forward_are_used(net, data):
    x, y = data()
    smoothed = lambda z, t: nn.functional.cross_entropy(z, t, reduction="none", label_smoothing=0.2)  # noqa: E731
    for mode in ("finite_difference", "head"):
        model = net(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        forward = lambda model, batch: (model(batch["image"]), batch["class"])  # noqa: E731
        meta = MetaRescaler(model, optimizer, 3, forward, loss_fn=smoothed, passes=1, meta_grad=mode)
        result = meta.step({"image": x, "class": y})
        plain = net(dropout=0.0)
        torch.testing.assert_close(result.losses, smoothed(plain(x), y).detach())


@pytest.mark.parametrize("options", [{}, {"virtual_lr": 0.5}, {"mode": "official", "virtual_lr": 0.01}])
def test_what_the_optimizer_does_not_hold_has_no_part_in_a_virtual_step(net, data, options):
    batches, found = [data() for _ in range(3)], []
    for frozen in (True, False):
        model = net(norm=False)
        model.body.requires_grad_(not frozen)
        meta = MetaRescaler(model, torch.optim.Adam(model.head.parameters(), lr=0.01), 3, **options)
        for batch in batches:  # gradients of the body pile up, since nobody removes them
            torch.manual_seed(2)
            meta.step(batch)
        found.append([*model.parameters(), *meta.rescaler.parameters()])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_an_optimizer_of_another_model_is_refused(net):
    with pytest.raises(UsageError, match="holds none of the model's trainable parameters"):
        MetaRescaler(net(), torch.optim.Adam(net().parameters()), 3)


def test_a_saved_state_stays_as_it_was_saved_while_training_goes_on(net, data):
    model = net()
    meta = MetaRescaler(model, torch.optim.Adam(model.parameters()), 3)
    meta.step(data())
    state = meta.state_dict()
    saved = copy.deepcopy(state)
    meta.step(data())
    meta.load_state_dict(state)
    meta.step(data())
    assert torch.equal(state["rescaler"]["first"], saved["rescaler"]["first"])
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])


def test_a_state_may_hold_a_batch_that_is_a_named_tuple(net, data):
    pair = collections.namedtuple("Pair", "x y")
    model = net()
    meta = MetaRescaler(model, torch.optim.Adam(model.parameters()), 3)
    meta.step(pair(*data()))
    meta.load_state_dict(meta.state_dict())
    assert meta.step(pair(*data())).meta_loss is not None
