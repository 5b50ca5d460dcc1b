"""Models that other people write, against one backward pass per output."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weightsmith.core.errors import UsageError
from weightsmith.diagnose import KernelOptions, LazinessProbe, tangent_kernel


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


class Loose(nn.Module):
    """A scalar, an empty and an unused parameter; a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.unused = nn.Linear(4, 2), nn.Linear(5, 5)
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return {"extra": [torch.tanh(self.body(x)) * self.scale], "loss": None}


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.first, self.body = reentrant, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return checkpoint(lambda h: torch.tanh(self.body(h)), self.first(x), use_reentrant=self.reentrant)


def grouped():
    layers = nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 2, 2, stride=2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 2))


def sparse():
    return nn.Sequential(nn.Embedding(11, 6, sparse=True, padding_idx=0), nn.Flatten(), nn.Linear(24, 3))


TOKENS = torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(0))
NUMBERS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
MODELS = {
    "tied": (Tied, TOKENS),
    "sparse gradients": (sparse, TOKENS),
    "bag of embeddings": (lambda: nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 3)), TOKENS),
    "loose parameters": (Loose, NUMBERS),
    "grouped convolution": (grouped, torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))),
    "one row, one sample": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 1)), NUMBERS[:1]),
    "checkpoints": (lambda: Checkpointed(False), NUMBERS),
}


def one_backward_per_output(model, x):
    returned = model(x)
    out = returned["extra"][0] if isinstance(returned, dict) else returned
    params = list(model.parameters())
    rows = []
    for value in out.flatten():
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, params, strict=True)]
        rows.append(torch.cat([g.flatten() for g in dense]).double())
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_that_of_one_backward_per_output(name):
    torch.manual_seed(0)
    build, x = MODELS[name]
    model = build()
    expected = one_backward_per_output(model, x)
    scale = expected.abs().max()
    for method in ("jacobian", "contract"):
        found = tangent_kernel(model, x, options=KernelOptions(method=method)).matrix.double()
        assert (found - expected).abs().max() < 1e-5 * scale
    rough = tangent_kernel(model, x, options=KernelOptions(method="sketch", probes=600)).matrix.double()
    assert (rough - expected).norm() < 0.5 * expected.norm()


def test_weights_that_are_not_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    probe = LazinessProbe(model, NUMBERS)
    before = probe.snapshot(model)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        report = probe.compare(before, model)
    assert "kernel_alignment" in report.not_finite
    assert "effective_rank of 0.weight" in report.not_finite


def test_reentrant_checkpoints_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match="use_reentrant=False"):
        tangent_kernel(Checkpointed(True), NUMBERS)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match="probe the module"):
        LazinessProbe(torch.jit.script(nn.Sequential(nn.Linear(4, 2))), NUMBERS)


@pytest.mark.parametrize("inputs", [NUMBERS[:0], (), {}, torch.tensor(1.0), "text"])
def test_empty_inputs_are_refused(inputs):
    with pytest.raises(UsageError, match="inputs must hold samples"):
        LazinessProbe(nn.Linear(4, 2), inputs)


@pytest.mark.parametrize("method", ["jacobian", "contract", "sketch"])
def test_a_module_used_under_two_names_keeps_its_parameters(method):
    shared = nn.Linear(4, 4)
    net, weight = nn.Sequential(shared, nn.Tanh(), shared), shared.weight
    tangent_kernel(net, torch.randn(3, 4), options=KernelOptions(method=method, probes=8))
    assert net[0].weight is weight
    assert net[2].weight is weight


@pytest.mark.parametrize("method", ["jacobian", "contract", "sketch"])
def test_what_forward_puts_into_a_model_is_gone_afterwards(method):
    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            self.last = x
            return self.layer(x)

    net = Notes()
    count = net.count
    tangent_kernel(net, torch.randn(3, 4), options=KernelOptions(method=method, probes=8))
    assert net.count is count
    assert count == 0
    assert "last" not in net.__dict__


def test_a_sketch_of_complex_weights_has_the_size_of_the_kernel():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))

        def forward(self, x):
            return torch.view_as_real(x.to(self.w.dtype) @ self.w)

    torch.manual_seed(0)
    net, x = Complex(), torch.randn(3, 4, dtype=torch.float64)
    exact = tangent_kernel(net, x, options=KernelOptions(method="jacobian")).parts[""].trace()
    sketched = tangent_kernel(net, x, options=KernelOptions(method="sketch", probes=2000)).parts
    assert next(iter(sketched.values())).square().sum() / 2000 == pytest.approx(exact.item(), rel=0.1)
