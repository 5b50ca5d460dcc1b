"""Where the examples of a batch are: linear bounds need to know, and refuse models that mix them."""

import pytest
import torch
from torch import nn

from weightsmith.certify import UnsupportedOperation, bounds, input_box, trace, verified_error

LINEAR = ("crown-ibp", "crown")


class Calls(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)
        self.double().eval()

    def forward(self, x, a=None):
        return self.function(self, x) if a is None else self.function(self, x, a)


def two_views(m, x):
    one, other = m.layer(torch.cat([x, -x])).relu().chunk(2)
    return one + other


def contains(model, inputs, eps, method):
    x, *rest = inputs
    found, box = bounds(model, inputs, eps, method=method), input_box(x, eps)
    for seed in range(40):
        share = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        values = model(box.lower + (share.round() if seed % 2 else share) * (box.upper - box.lower), *rest)
        assert (values >= found.lower - 1e-9).all()
        assert (values <= found.upper + 1e-9).all()


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x - 2 * x.flip(0),
        lambda _, x: -x.cumsum(0),
        lambda _, x: x.softmax(0),
        lambda m, x: m.layer(x).T,
        lambda m, x: m.layer(x).reshape(-1, 2),
    ],
)
def test_linear_bounds_refuse_what_mixes_examples_or_returns_no_row_of_each(function, method):
    torch.manual_seed(0)
    model, x = Calls(function, layer=nn.Linear(4, 4)), torch.randn(3, 4, dtype=torch.float64)
    contains(model, (x,), 0.1, "ibp")
    with pytest.raises(UnsupportedOperation, match=r"example.*ibp"):
        bounds(model, x, 0.1, method=method)


@pytest.mark.parametrize("method", LINEAR)
def test_positions_may_count_before_examples(method):
    def positions_first(m, x):
        flat = m.first(x.transpose(0, 1).reshape(-1, 2)).relu()  # (T * B, 4), as in torch's attention
        return m.second(flat.view(3, -1, 4).transpose(0, 1).flatten(1).relu())

    torch.manual_seed(0)
    model = Calls(positions_first, first=nn.Linear(2, 4), second=nn.Linear(12, 3))
    contains(model, (torch.randn(5, 3, 2, dtype=torch.float64),), 0.1, method)


@pytest.mark.parametrize("method", LINEAR)
def test_two_views_of_every_example_may_lie_in_one_batch(method):
    torch.manual_seed(0)
    contains(Calls(two_views, layer=nn.Linear(4, 4)), (torch.randn(3, 4, dtype=torch.float64),), 0.1, method)


@pytest.mark.parametrize("method", LINEAR)
def test_an_attention_layer_has_each_examples_own_bounds(method):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    model = Calls(lambda m, x: torch.relu(m.layer(x)[:, 0]) - x.mean(1), layer=layer)
    contains(model, (torch.randn(3, 5, 4, dtype=torch.float64),), 0.01, method)


@pytest.mark.parametrize("method", ["ibp", *LINEAR])
def test_a_second_input_may_have_no_examples(method):
    torch.manual_seed(0)
    model = Calls(lambda m, x, a: m.layer(torch.relu(a @ x)).mean(1), layer=nn.Linear(4, 3))
    graph = torch.randn(6, 6, dtype=torch.float64)
    contains(model, (torch.randn(2, 6, 4, dtype=torch.float64), graph), 0.1, method)


def test_no_example_is_proved_where_batch_statistics_are_part_of_the_model():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedOperation, match="running statistics"):
        verified_error(net, [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))], 0.01)


def test_labels_of_every_whole_number_type_are_taken_and_one_class_is_refused():
    net, x = nn.Linear(4, 3), torch.randn(3, 4)
    y = torch.tensor([0, 2, 1])
    errors = {float(verified_error(net, [(x, y.to(kind))], 0.01)) for kind in (torch.long, torch.int32, torch.uint8)}
    assert len(errors) == 1
    with pytest.raises(ValueError, match="two classes"):
        verified_error(nn.Linear(4, 1), [(x, torch.zeros(3, dtype=torch.long))], 0.01)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        trace(nn.Linear(4, 3), torch.zeros(0, 4))
