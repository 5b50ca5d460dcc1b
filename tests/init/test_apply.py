"""One verb on the weights of models that store them in many ways."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from weightsmith.core.errors import UsageError
from weightsmith.init import apply_, low_rank_

RANK = torch.linalg.matrix_rank


def cut(w):
    return low_rank_(w, 2)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_weights_are_cut_gate_by_gate(kind, gates):
    model = nn.Sequential(kind(3, 8, num_layers=2, bidirectional=True), nn.Linear(16, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = apply_(model, cut)
    assert report.model is model
    assert set(report.changed.values()) == {gates}
    assert len(report.changed) == 4
    for name, tensor in model.state_dict().items():
        if "weight_hh" in name:
            assert [int(RANK(gate)) for gate in tensor.chunk(gates)] == [2] * gates
        else:
            assert torch.equal(tensor, before[name])


def test_cells_are_recurrent_too():
    assert apply_(nn.GRUCell(3, 8), cut).changed == {"weight_hh": 3}


def test_convolutions_are_read_with_outputs_as_rows():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(4, 5))
    assert apply_(model, cut, "*weight").changed == {"0.weight": 1, "1.weight": 2, "2.weight": 1}
    assert RANK(model[0].weight.flatten(1)) == 2
    for group in model[1].weight.chunk(2):
        assert RANK(group.movedim(1, 0).flatten(1)) == 2
    assert RANK(model[2].weight) == 2


def test_packed_attention_is_three_matrices():
    model = nn.MultiheadAttention(8, 2)
    assert apply_(model, cut, "in_proj_weight").changed == {"in_proj_weight": 3}
    assert [int(RANK(part)) for part in model.in_proj_weight.chunk(3)] == [2, 2, 2]


def test_a_transformer_of_others_with_its_inputs_first():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    report = apply_(model, cut, ["*mlp*", "*ln_1*"])
    assert report.skipped
    assert all("ln_1" in name or "bias" in name for name in report.skipped)
    assert RANK(model.transformer.h[0].mlp.c_fc.weight) == 2


def test_a_tied_weight_is_changed_once_under_either_name():
    model = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 6, bias=False))
    model[1].weight = model[0].weight
    calls = []
    apply_(model, lambda w: calls.append(w.shape) or cut(w), "1.weight")
    assert calls == [(6, 5)]
    assert model[1].weight is model[0].weight
    assert RANK(model[0].weight) == 2


def test_a_predicate_sees_names_and_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    report = apply_(model, cut, lambda name, p: p.dim() == 2 and p.shape[0] == p.shape[1])
    assert list(report.changed) == ["1.weight"]
    assert str(report) == "1.weight"


def test_nothing_changes_when_one_of_them_fails():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.zero_()
    before = model[0].weight.clone()
    with pytest.raises(UsageError, match="cannot be kept"):
        apply_(model, lambda w: low_rank_(w, 1, base="current"), "*")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parametrizations.weight_norm, "fold_"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "pruned by a mask"),
    ],
)
def test_a_computed_weight_is_refused_with_what_to_do(change, message):
    model = nn.Sequential(nn.Linear(4, 4))
    change(model[0])
    with pytest.raises(UsageError, match=message):
        apply_(model, cut, "*")


@pytest.mark.parametrize(
    ("where", "message"),
    [(None, "matches no parameter"), ("0.wieght", "did you mean 0.weight"), ("*bias", "vectors alone")],
)
def test_where_nothing_can_be_done_it_says_so(where, message):
    with pytest.raises(UsageError, match=message.replace("0.weight", "'0.weight'")):
        apply_(nn.Sequential(nn.Linear(4, 4)), cut, where)


def test_a_where_of_another_type_is_refused():
    with pytest.raises(TypeError, match="where must be"):
        apply_(nn.Linear(2, 2), cut, 3)


def test_a_function_that_changes_nothing_in_place_is_refused():
    model = nn.RNN(3, 4)
    before = model.weight_hh_l0.clone()
    with pytest.raises(UsageError, match="must change weight_hh_l0 in place"):
        apply_(model, lambda w: 2 * w)
    assert torch.equal(model.weight_hh_l0, before)
