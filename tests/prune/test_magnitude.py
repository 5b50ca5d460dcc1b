import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.prune import MagnitudePruner, load_sparse, save_sparse
from weightsmith.prune.bits import pack_bits, unpack_bits
from weightsmith.prune.ranking import percentile


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 3)).to(dtype)


def numpy_rule(weights, masks, amount):
    """The rule of the authors' code, as numpy has it."""
    pool = np.concatenate([w[w != 0].ravel() for w in weights])
    threshold = np.percentile(np.abs(pool), 100 * amount)
    return [np.where(np.abs(w) < threshold, False, m) for w, m in zip(weights, masks, strict=True)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.floats(0.01, 0.9), st.booleans())
def test_masks_are_those_of_numpys_percentile(seed, amount, with_ties):
    model = network(seed, torch.float64)
    if with_ties:
        for parameter in model.parameters():
            parameter.data = (parameter.data * 8).round() / 8  # ties and zeros
    weights = [model[i].weight.detach().numpy().copy() for i in (0, 3)]
    if not any((w != 0).any() for w in weights):
        return
    pruner = MagnitudePruner(model, min_density=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.prune_(amount)
    expected = numpy_rule(weights, [np.ones(w.shape, bool) for w in weights], amount)
    for mask, rule in zip(pruner.masks.values(), expected, strict=True):
        assert np.array_equal(mask.numpy(), rule)


def ceiling(position):
    # a hair above a whole number, numpy's interpolation decides
    assume(not 0 < position - math.floor(position) < 1e-11 * position)
    return math.ceil(position)


@settings(deadline=None)
@given(st.lists(st.floats(0, 2.0**99, width=32, allow_subnormal=False), min_size=2, max_size=50), st.data())
def test_the_ranked_value_is_that_of_a_sort(values, data):
    nonzero = sorted(v for v in values if v)
    if not nonzero:
        return
    amount = data.draw(st.floats(0, 0.99))
    k = ceiling(amount * (len(nonzero) - 1))
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        assert percentile(lambda: iter([tensor[:1], tensor[1:]]), amount, tensor[::2]) == (nonzero[k], k)  # noqa: B023


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.floats(0, 0.99), st.sampled_from(["plain", "sorted", "ties", "zeros"]))
def test_a_sample_that_misleads_changes_nothing(seed, amount, kind):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(300_000, generator=generator).abs()
    if kind == "sorted":
        values = values.sort().values
    if kind == "ties":
        values = (values * 2).round()
    if kind == "zeros":
        values[::997] = 0  # what the sample sees
    nonzero = values[values > 0].sort().values
    k = ceiling(amount * (len(nonzero) - 1))
    assert percentile(lambda: iter(values.split(1 << 17)), amount, values[::997]) == (nonzero[k].item(), k)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(unpack_bits(pack_bits(mask), (len(bits),)), mask)


def test_densities_fall_by_the_amount_and_masks_only_shrink():
    pruner = MagnitudePruner(network())
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for number in range(1, 5):
        report = pruner.prune_(0.2)
        assert report.density == pytest.approx(0.8**number, abs=0.02)
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
            before[name] = mask.clone()
    assert pruner.round == 4
    assert report.density < report.density_of_all < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_ranked_exactly(dtype):
    model = network(dtype=dtype)
    wide = network(dtype=dtype).double()
    pruner, other = MagnitudePruner(model), MagnitudePruner(wide)
    pruner.prune_(0.5)
    other.prune_(0.5)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, other.masks[name])


def test_ties_survive_unless_exactness_is_asked_for():
    model = nn.Linear(10, 10)
    model.weight.data.fill_(0.5)
    loose = MagnitudePruner(copy.deepcopy(model)).prune_(0.5)
    exact = MagnitudePruner(model).prune_(0.5, exact=True)
    assert loose.density == 1
    assert exact.density == pytest.approx(0.5, abs=0.01)


def test_layerwise_and_groups_have_thresholds_of_their_own():
    model = network()
    model[0].weight.data.mul_(100)
    layerwise = MagnitudePruner(copy.deepcopy(model), scope="layerwise").prune_(0.5)
    assert [t.density for t in layerwise.tensors if t.prunable] == pytest.approx([0.5, 0.5], abs=0.03)
    groups = MagnitudePruner(copy.deepcopy(model), scope=["0.*"]).prune_(0.5)
    assert [t.density for t in groups.tensors if t.prunable] == pytest.approx([0.5, 0.5], abs=0.03)
    normalized = MagnitudePruner(copy.deepcopy(model), score="magnitude_normalized").prune_(0.3)
    assert all(0.6 < t.density < 0.8 for t in normalized.tensors if t.prunable)
    with pytest.warns(WeightsmithWarning, match=r"nothing is left of 3\.weight"):
        collapsed = MagnitudePruner(model, min_density=0).prune_(0.4)
    assert collapsed.empty == ("3.weight",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_score_multiplies_trained_and_first_values(dtype):
    model = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    pruner = MagnitudePruner(model, score="magnitude_times_init")
    with pytest.raises(UsageError, match="snapshot 'init' is missing"):
        pruner.prune_(0.3)
    pruner.snapshot()
    first = model[0].weight.detach().double()
    model[0].weight.data.mul_(torch.rand(30, 40) + 0.1)
    product = (model[0].weight.detach().double() * first).abs()
    pruner.prune_(0.3, exact=True)
    kept = pruner.masks["0.weight"]
    assert kept.sum() == 840
    assert product[kept].min() >= product[~kept].max()


def test_no_layer_dies_by_default():
    model = network()
    model[3].weight.data.mul_(1e-6)
    report = MagnitudePruner(model, min_density=0.1).prune_(0.6)
    densities = {t.name: t.density for t in report.tensors}
    assert densities["3.weight"] >= 0.1
    assert not report.empty


def test_rewinding_resets_statistics_and_every_parameter():
    model = network()
    start = copy.deepcopy(model.state_dict())
    pruner = MagnitudePruner(model)
    pruner.snapshot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 7)).square().mean().backward()
        optimizer.step()
    pruner.prune_(0.3)
    assert pruner.rewind_() is model
    for name, value in model.state_dict().items():
        expected = start[name] * pruner.masks[name] if name in pruner.masks else start[name]
        assert torch.equal(value, expected)
    model(torch.randn(8, 7)).square().mean().backward()  # training must not write into the snapshot
    optimizer.step()
    pruner.rewind_()
    assert torch.equal(model[0].bias, start["0.bias"])


def test_late_rewinding_and_going_on():
    model = network()
    pruner = MagnitudePruner(model)
    pruner.snapshot()
    model[0].weight.data.add_(1)
    pruner.snapshot("epoch 1")
    model[0].weight.data.add_(1)
    last = model[0].weight.detach().clone()
    pruner.prune_(0.1)
    pruner.rewind_("last")
    assert torch.equal(model[0].weight, last * pruner.masks["0.weight"])
    pruner.rewind_("epoch 1")
    torch.testing.assert_close(model[0].weight.data, (last - 1) * pruner.masks["0.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    ],
)
def test_pruned_weights_stay_at_zero_and_others_train_as_with_masked_gradients(make):
    runs = []
    for mask_gradients in (False, True):
        model = network()
        pruner = MagnitudePruner(model)
        pruner.prune_(0.5)
        optimizer = make(model.parameters())
        pruner.attach(optimizer, mask_gradients=mask_gradients)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 7, generator=generator)).square().mean().backward()
            optimizer.step()
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name)[~mask].any()
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name])


def test_names_and_state_dict_stay_and_it_compiles():
    model = network()
    keys = list(model.state_dict())
    pruner = MagnitudePruner(model)
    pruner.prune_(0.5)
    assert list(model.state_dict()) == keys
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    x = torch.randn(4, 7)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_pruner_resumes():
    def use(pruner):
        pruner.prune_(0.3)
        pruner.rewind_()
        return {name: mask.clone() for name, mask in pruner.masks.items()}

    model = network()
    pruner = MagnitudePruner(model, score="random", seed=4)
    pruner.snapshot()
    use(pruner)
    resumed = MagnitudePruner(network(5), score="random", seed=4)
    resumed.model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    first, second = use(pruner), use(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.round == pruner.round == 2
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_controls():
    model, fresh = network(), network(9)
    pruner = MagnitudePruner(model, scope="layerwise")
    pruner.snapshot()
    pruner.prune_(0.6)
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    pruner.load_snapshot(fresh.state_dict(), "fresh")
    pruner.rewind_("fresh")
    assert torch.equal(model[0].weight, fresh[0].weight * pruner.masks["0.weight"])
    before = pruner.masks["0.weight"].clone()
    pruner.shuffle_()
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == kept
    assert not torch.equal(pruner.masks["0.weight"], before)


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_semi_structured_patterns_keep_the_largest_of_each_group(pattern, keep, of):
    model = nn.Conv2d(8, 4, 3)
    report = MagnitudePruner(model).prune_(pattern=pattern)
    groups = model.weight.detach().reshape(-1, of)
    assert ((groups != 0).sum(1) == keep).all()
    assert report.density == 0.5


@pytest.mark.parametrize("kind", ["Conv1D", "transposed", "experts"])
def test_patterns_go_along_the_inputs_however_a_weight_is_stored(kind):
    torch.manual_seed(0)
    if kind == "Conv1D":
        model = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    elif kind == "transposed":
        model = nn.ConvTranspose2d(8, 6, 1)
    else:
        model = nn.Module()
        model.is_transposed = True  # as transformers marks its experts
        model.weight = nn.Parameter(torch.randn(2, 8, 6))  # (experts, in, out)
    pruner = MagnitudePruner(model)
    pruner.prune_(pattern="2:4")
    kept = pruner.masks["weight"]
    outputs_last = kept.movedim(1, -1).reshape(8, 6) if kind == "transposed" else kept
    assert (outputs_last.unflatten(-2, (2, 4)).sum(-2) == 2).all()


def test_rows_of_experts_that_are_no_multiple_of_a_pattern_are_refused():
    class NarrowExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 6))

    with pytest.raises(UsageError, match="no multiple of 4"):
        MagnitudePruner(NarrowExperts()).prune_(pattern="2:4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [101, 181, 201, 341])
def test_a_whole_position_that_rounding_misses_is_ranked_as_by_numpy(count, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(count, 1, bias=False, dtype=dtype)
    magnitudes = layer.weight.detach().abs().numpy().reshape(-1)
    removed = int((magnitudes < np.percentile(magnitudes, 55)).sum())
    pruner = MagnitudePruner(layer)
    pruner.prune_(0.55)
    assert int((~pruner.masks["weight"]).sum()) == removed


class Strange(nn.Module):
    """Tied, frozen and shared layers, packed projections, a free parameter."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(4, 8))
        self.shared = nn.ModuleList([nn.Linear(8, 8)] * 2)


def test_what_is_pruned_of_a_strange_model():
    pruner = MagnitudePruner(Strange())
    assert set(pruner.masks) == {
        "table.weight", "attention.in_proj_weight", "attention.out_proj.weight", "shared.0.weight"
    }  # fmt: skip
    assert "frozen" in pruner.left_out["frozen.weight"]
    assert "frozen.weight" in MagnitudePruner(Strange(), frozen=True).masks


def test_computed_weights_are_left_out_or_refused_by_name():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert "is computed" in MagnitudePruner(model).left_out["0.weight"]
    with pytest.raises(UsageError, match="is computed"):
        MagnitudePruner(model, where="0")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.prune_(1.0), "amount must be a fraction"),
        (lambda p: p.prune_(20), "amount must be a fraction"),
        (lambda p: p.prune_(-0.1), "amount must be a fraction"),
        (lambda p: p.prune_(pattern="1:3"), "pattern must be one of"),
        (lambda p: p.prune_(pattern="2:4"), r"0\.weight: the inputs of a weight"),
        (lambda p: p.rewind_(), "snapshot 'init' is missing"),
        (lambda p: p.load_snapshot({}), r"lacks '0\.weight'"),
        (lambda p: p.load_snapshot(network().state_dict() | {"0.weight": torch.ones(2)}), r"0\.weight has shape"),
        (lambda p: p.load_state_dict(p.state_dict() | {"masks": {}}), "no mask for"),
        (lambda p: MagnitudePruner(network(), scope="all"), "scope must be"),
        (lambda p: MagnitudePruner(network(), scope=["9.*"]), "matches none"),
        (lambda p: MagnitudePruner(network(), score="size"), "score"),
        (lambda p: MagnitudePruner(network(), min_density=1), "min_density must be"),
        (lambda p: MagnitudePruner(nn.ReLU()), "matches nothing"),
        (lambda p: MagnitudePruner(network(), faithful=True, where="0"), "where must be None"),
    ],
)
def test_bad_use(call, message):
    with pytest.raises(UsageError, match=message):
        call(MagnitudePruner(network()))


def test_a_changed_snapshot_is_noticed():
    pruner = MagnitudePruner(network())
    pruner.snapshot()
    pruner._snapshots["init"]["0.bias"].add_(1)
    with pytest.raises(UsageError, match="has been changed"):
        pruner.rewind_()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_before_anything_changes(value):
    model = network()
    model[3].weight.data[0, 0] = value
    pruner = MagnitudePruner(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(UsageError, match=r"3\.weight holds NaN or infinite"):
        pruner.prune_(0.5)
    assert torch.equal(model[0].weight, before)
    assert pruner.round == 0


def test_nothing_left_to_prune_is_a_warning():
    model = nn.Linear(3, 3)
    model.weight.data.zero_()
    with pytest.warns(WeightsmithWarning, match="all weights are zero already"):
        MagnitudePruner(model).prune_(0.5)
    assert MagnitudePruner(network()).prune_(0.0).density == 1


def test_the_report_reads_well():
    text = str(MagnitudePruner(network()).prune_(0.5))
    assert "of prunable weights kept" in text
    assert "0.weight (11, 7)" in text


class Experts(nn.Module):
    """Stacked expert weights with a router, beside a layer that is there twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))
        self.gate, self.again = nn.Linear(8, 4), nn.Linear(8, 8)
        self.shared = self.again

    def forward(self, x):
        h = torch.einsum("bi,eio->beo", self.shared(self.again(x)), self.up).relu()
        return (torch.einsum("beo,eoi->bei", h, self.down) * self.gate(x).softmax(-1)[..., None]).sum(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.cell(x[:, None])[0][:, -1])


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


STRANGE = {
    "experts": Experts, "recurrent": Recurrent, "tied": tied, "frozen": frozen,
    "grouped": lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 1, groups=2), nn.Flatten()),
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 4, 2, groups=2)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).bfloat16(),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), backend="eager"),
    "normalized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_models_are_pruned_trained_rewound_and_stored(kind, tmp_path):
    torch.manual_seed(0)
    model = STRANGE[kind]()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
    pruner = MagnitudePruner(model)
    pruner.snapshot()
    assert pruner.prune_(0.5).density == pytest.approx(0.5, abs=0.03)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruner.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(x[:, None] if kind == "attention" else x).float().square().mean().backward()
        optimizer.step()
    for name, mask in pruner.masks.items():
        assert (model.state_dict()[name][~mask] == 0).all()
    pruner.rewind_()
    for name, tensor in model.state_dict().items():
        mask = pruner.masks.get(name, torch.ones((), dtype=torch.bool))
        if kind == "tied" and name == "2.weight":
            mask = pruner.masks["0.weight"]
        if kind == "experts" and name == "shared.weight":
            mask = pruner.masks["again.weight"]
        assert torch.equal(tensor, first[name] * mask)
    path = save_sparse(model, tmp_path / "m.safetensors", masks=pruner.masks)
    other = STRANGE[kind]()
    load_sparse(path, other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_weight_whose_entries_share_memory_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    assert MagnitudePruner(model).left_out == {"0.weight": "is expanded: its entries share memory"}
