"""Reference values: the authors' script on a recurrent network, and NumPy on a perceptron and a linear network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith import diagnose
from weightsmith.diagnose import KernelOptions

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "rich-lazy.safetensors")
EXACT = ("jacobian", "contract")


class Rnn(nn.Module):
    """The authors' network: no biases, ReLU, hidden state from zero, time first."""

    def __init__(self, weights):
        super().__init__()
        units, inputs = weights["input2h"].shape
        self.input2h, self.h2h = nn.Linear(inputs, units, bias=False), nn.Linear(units, units, bias=False)
        self.fc = nn.Linear(units, len(weights["fc"]), bias=False)
        self.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})

    def forward(self, x):
        h, states = torch.zeros(x.shape[1], self.h2h.in_features, dtype=x.dtype), []
        for now in x:
            h = torch.relu(self.input2h(now) + self.h2h(h))
            states.append(h)
        states = torch.stack(states)
        return self.fc(states), states


def rnn(index, moment):
    names = ("input2h", "h2h", "fc")
    return Rnn({name: GOLDEN[f"rnn_2af/{index}/{moment}/{name}"] for name in names}).double()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_authors_measures_of_a_recurrent_network(index):
    before, after = rnn(index, "init"), rnn(index, "final")
    x = GOLDEN["rnn_2af/inputs0"].double()
    first, last = GOLDEN["rnn_2af/window"].tolist()
    change = diagnose.weight_change(before.h2h.weight, after.h2h.weight)
    assert change == pytest.approx(GOLDEN["rnn_2af/weight_change"][index].item(), rel=1e-5)
    h0, h1 = (model(x)[1][first:last].detach() for model in (before, after))
    # zeros of the authors' float32 activity are zeros here
    found = diagnose.sign_similarity(*(model.float()(x.float())[1][first:last] for model in (before, after)))
    assert found == pytest.approx(GOLDEN["rnn_2af/sign_similarity"][index].item(), abs=1e-12)
    assert diagnose.representation_alignment(h0[-1], h1[-1]) == pytest.approx(
        GOLDEN["rnn_2af/representation_alignment"][index].item(), rel=1e-5
    )
    assert diagnose.representation_alignment(h0[-1], h1[-1], centered=True) == pytest.approx(
        GOLDEN["rnn_2af/linear_cka"][index].item(), rel=1e-6
    )


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_authors_kernels_of_a_recurrent_network(index, method):
    x = GOLDEN["rnn_2af/inputs0"].double()[:, :32]
    kernels = [
        diagnose.tangent_kernel(
            rnn(index, moment), x, params="h2h.*", batch_dim=1, options=KernelOptions(method=method)
        )
        for moment in ("init", "final")
    ]
    expected = GOLDEN["rnn_2af/kernel_trace_norm"][index]
    found = torch.tensor([float(f(k.matrix)) for k in kernels for f in (torch.trace, torch.linalg.norm)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    value, error = kernels[0].alignment(kernels[1])
    assert value == pytest.approx(GOLDEN["rnn_2af/kernel_alignment"][index].item(), rel=1e-4)
    assert error == 0
    if index == 0:
        ordered = kernels[0].matrix.view(32, 8, 3, 32, 8, 3).permute(1, 0, 2, 4, 3, 5).reshape(768, 768)
        torch.testing.assert_close(ordered[:12, :12], GOLDEN["rnn_2af/K0_corner"], rtol=1e-6, atol=1e-6)


def perceptron(moment):
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model.load_state_dict(
        {f"{2 * i}.{part}": GOLDEN[f"mlp/{moment}/{i}.{part}"] for i in range(3) for part in ("weight", "bias")}
    )
    return model


@pytest.mark.parametrize("method", EXACT)
def test_a_perceptron(method):
    before, after, x = perceptron("init"), perceptron("final"), GOLDEN["mlp/x"]
    options = KernelOptions(method=method)
    k0, k1 = (diagnose.tangent_kernel(model, x, options=options) for model in (before, after))
    torch.testing.assert_close(k0.matrix, GOLDEN["mlp/ntk_init"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(k1.matrix, GOLDEN["mlp/ntk_final"], rtol=1e-8, atol=1e-12)
    h0, h1 = (model[:4](x).detach() for model in (before, after))
    y = GOLDEN["mlp/y"]
    found = [
        k0.alignment(k1)[0],
        diagnose.representation_alignment(h0, h1),
        diagnose.representation_alignment(h0, h1, centered=True),
        diagnose.weight_change(before.state_dict(), after.state_dict()),
        *(diagnose.kernel_target_alignment(k.matrix, y, by=by) for by in ("norm", "trace") for k in (k0, k1)),
    ]
    assert found == pytest.approx(GOLDEN["mlp/scalars"].tolist(), rel=1e-8)
    layers = k0.alignment_per_layer(k1)
    assert list(layers) == ["0", "2", "4"]
    assert list(layers.values()) == pytest.approx(GOLDEN["mlp/per_layer_kernel_alignment"].tolist(), rel=1e-8)
