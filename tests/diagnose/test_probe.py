"""A probe before and after training, on models of many kinds."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.diagnose import KernelOptions, LazinessProbe, Snapshot


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def moved(model, by=0.3):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter)
    return other


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kernel", ["jacobian", "contract", "sketch", None])
def test_a_model_that_stays_is_lazy_and_one_that_moves_is_less(kernel):
    model = net()
    probe = LazinessProbe(model, X, kernel=kernel, targets=None)
    before = probe.snapshot(model)
    same, other = probe.compare(before, model), probe.compare(before, moved(model))
    assert same.weight_change == same.relative_weight_change == 0
    for values in (same.representation_alignment, same.centered_alignment, same.sign_similarity, same.per_layer):
        assert all(value == pytest.approx(1, abs=1e-6) for value in values.values())
    assert other.weight_change > 0
    assert max(other.representation_alignment.values()) < 1
    if kernel is None:
        assert math.isnan(same.kernel_alignment)
    else:
        assert same.kernel_alignment == pytest.approx(1, abs=1e-6)
        assert other.kernel_alignment < 0.999
    assert same.not_finite == []
    for text in ("weight change 0", "4.weight: effective rank (participation)", "40 samples"):
        assert text in str(same)
    assert same.to_dict()["samples"] == 40


def test_the_probe_leaves_no_trace():
    model = net().train()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    probe = LazinessProbe(model, X)
    probe.compare(probe.snapshot(model), model)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert "0.bias" not in probe.names


def test_a_linear_model_has_a_kernel_that_never_changes():
    model = nn.Linear(4, 2)
    probe = LazinessProbe(model, X)
    assert probe.compare(probe.snapshot(model), moved(model, 3.0)).kernel_alignment == pytest.approx(1, abs=1e-6)


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0.01, 2))
@settings(max_examples=20, deadline=None)
def test_alignments_stay_in_their_range(seed, width, by):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    probe = LazinessProbe(model, X[:6])
    found = probe.compare(probe.snapshot(model), moved(model, by))
    values = [found.kernel_alignment, *found.per_layer.values(), *found.representation_alignment.values()]
    assert all(-1e-6 <= value <= 1 + 1e-6 for value in values)


def test_a_dead_layer_is_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
    nn.init.constant_(model[0].bias, -100.0)
    probe = LazinessProbe(model, X, layers=["1"], params="0.*")
    before = probe.snapshot(model)
    with pytest.warns(WeightsmithWarning) as caught:
        found = probe.compare(before, model)
    words = " ".join(str(w.message) for w in caught)
    assert "the activity of 1 is NaN" in words
    assert "the tangent kernel of 0 is NaN" in words
    assert math.isnan(found.kernel_alignment)
    assert math.isnan(found.representation_alignment["1"])
    assert "representation_alignment of 1" in str(found)


def test_a_diverged_model_is_reported_entry_by_entry():
    model = net()
    probe = LazinessProbe(model, X)
    before = probe.snapshot(model)
    broken = copy.deepcopy(model)
    broken[4].weight.data.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = probe.compare(before, broken)
    assert math.isnan(found.weight_change)
    assert "effective_rank of 4.weight" in found.not_finite
    assert found.representation_alignment["0"] == pytest.approx(1, abs=1e-6)
    assert "not a number: " in str(found)


def test_snapshots_survive_safetensors():
    model = net()
    for options in (KernelOptions(), KernelOptions(method="sketch", probes=16), None):
        probe = LazinessProbe(model, X, kernel=options)
        before = probe.snapshot(model)
        again = Snapshot.from_state_dict(load(save(before.state_dict())))
        other = moved(model)
        assert str(probe.compare(again, other)).split(" s\n")[-1] == str(probe.compare(before, other)).split(" s\n")[-1]
    with pytest.raises(UsageError, match="no snapshot"):
        Snapshot.from_state_dict({"weight": torch.ones(1)})
    with pytest.raises(UsageError, match="no snapshot"):
        Snapshot.from_state_dict({"meta": torch.ones(3, dtype=torch.uint8)})


def test_inputs_that_were_changed_are_refused():
    model = net()
    probe, other = LazinessProbe(model, X), LazinessProbe(model, X + 1)
    with pytest.raises(UsageError, match="before is a snapshot for other inputs"):
        probe.compare(other.snapshot(model), model)
    probe.inputs += 1
    with pytest.raises(UsageError, match="changed in place"):
        probe.snapshot(model)


def test_a_model_of_another_shape_is_refused():
    model = net()
    probe = LazinessProbe(model, X)
    before = probe.snapshot(model)
    with pytest.raises(UsageError, match=r"has no '4\.weight'"):
        probe.compare(before, nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    wider = net()
    wider[0], wider[1], wider[4] = nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)
    with pytest.raises(UsageError, match="must have the shape that it had before"):
        probe.compare(before, wider)


def test_targets_are_aligned_before_and_after():
    model = net()
    y = torch.randn(40, 3)
    probe = LazinessProbe(model, X, targets=y)
    found = probe.compare(probe.snapshot(model), moved(model))
    first, second = found.kernel_target_alignment
    assert first != second
    assert f"{first:.4f} before" in str(found)
    assert found.curves()["kernel_target_alignment"] == second
    with pytest.raises(UsageError, match="targets must have 3 numbers per sample"):
        wrong = LazinessProbe(model, X, targets=y[:, :2])
        wrong.compare(wrong.snapshot(model), model)
    with pytest.raises(UsageError, match="targets must be 40 rows"):
        LazinessProbe(model, X, targets=y[:3])


def test_the_last_step_of_a_recurrent_network():
    model = nn.LSTM(4, 5, batch_first=True)
    x = X.view(10, 4, 4)
    probe = LazinessProbe(model, x, layers=[""], params="weight_hh*", activity=lambda out: out[0][:, -1])
    found = probe.compare(probe.snapshot(model), moved(model))
    assert list(found.representation_alignment) == [""]
    assert list(found.weight_changes) == ["weight_hh_l0"]
    assert 0 < found.representation_alignment[""] < 1
    assert "model: representation alignment" in str(found)


def test_tied_weights_and_positions_folded_into_the_batch():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    probe = LazinessProbe(model, {"input_ids": ids}, kernel=KernelOptions(reduce="trace"))
    assert "lm_head.weight" not in probe.names
    found = probe.compare(probe.snapshot(model), moved(model))
    assert "transformer.h.0.mlp.c_fc" in found.representation_alignment
    assert 0 < found.kernel_alignment < 1
    assert found.plan.reduce == "trace"


def test_half_precision_is_said():
    model = net().bfloat16()
    probe = LazinessProbe(model, X.bfloat16())
    with pytest.warns(WeightsmithWarning, match="half precision"):
        before = probe.snapshot(model)
    assert before.kernel.matrix.dtype == torch.float32


def test_a_plan_runs_nothing_but_one_pass():
    probe = LazinessProbe(net(), X)
    assert probe.plan(net()).samples == 32
    with pytest.raises(UsageError, match="kernel=None"):
        LazinessProbe(net(), X, kernel=None).plan(net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "9"}, "where='9' matches nothing"),
        ({"params": "9"}, "matches no parameter"),
        ({"kernel": "fast"}, "method 'fast' is not known"),
        ({"kernel_samples": 0}, "kernel_samples must be at least 1"),
        ({"rank": "spectral"}, "kind 'spectral' is not known"),
        ({"batch_dim": 2}, "inputs must hold samples"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        LazinessProbe(net(), X, **options)


def test_wrapped_models_are_refused():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(UsageError, match=r"probe model\.module"):
            LazinessProbe(wrapped, X)
        LazinessProbe(wrapped.module, X)
    finally:
        dist.destroy_process_group()
