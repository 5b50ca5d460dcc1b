"""Models that others wrote: bounds contain their outputs by every method; what cannot be bounded is named."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from weightsmith.certify import (
    BoundOptions,
    Interval,
    Planes,
    UnsupportedOperation,
    bounds,
    input_box,
    register_bound,
    trace,
)
from weightsmith.lab.models import build_model
from weightsmith.lab.models.vit import ViT

IMAGE = (3, 2, 8, 8)
METHODS = ("ibp", "crown-ibp", "crown")


class Deconvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(F.relu(self.up(F.relu(self.down(x)))).mean(dim=(2, 3)))


class TwoPools(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.pool(self.pool(self.conv(x))).flatten(1))


class SharedBranch(nn.Module):
    """Both branches of a residual block hold the same tensor, changed in place in one of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.act(x)  # x is ReLU(x) from here on
        y = self.conv(y)
        y += x
        return self.head(F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1))


class Attention(nn.Module):
    """Attention written out: a product of two activations, twice."""

    def __init__(self, causal=False):
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(2, 8, 4, 4), nn.Linear(8, 24)
        self.norm, self.head, self.causal = nn.LayerNorm(8), nn.Linear(8, 3), causal

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.matmul(q, k.transpose(-2, -1)) * (width // 2) ** -0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.head(x[:, 0] + x.mean(1))


class TorchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.mean(1))).mean(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 8, 3, padding="same", padding_mode="circular"), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.conv(x.flatten(2)).chunk(2, dim=1)
        return self.head((a * torch.sigmoid(b)).amax(-1))


class Functional(nn.Module):
    """Everything as functions and methods, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 2, 3, 3) / 3), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.out = nn.Parameter(torch.randn(64, 3) / 8)

    def forward(self, x):
        x = (x - 0.3) / torch.tensor([0.2, -0.5]).view(1, 2, 1, 1)
        x = F.conv2d(x, self.w, self.b, stride=2, padding=1)
        x = F.batch_norm(x, self.mean, self.var, eps=1e-3)
        x = torch.where(torch.arange(4).view(4, 1, 1) > 1, F.leaky_relu(x, 0.2), F.pad(x, (1, 0))[..., 1:].neg())
        return torch.einsum("bi,io->bo", x.view(x.size(0), -1), self.out)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(8), nn.Upsample(scale_factor=2),
            nn.AvgPool2d(4), nn.Dropout(0.3), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(128, 3), nn.Softmax(1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 6), nn.Linear(64, 6)

    def forward(self, x):
        left, right = torch.split(x.flatten(2), 1, dim=1)
        stacked = torch.stack([self.a(left.squeeze(1)), self.b(right[:, 0])], dim=1)
        return torch.maximum(stacked[:, 0], stacked[:, 1])[:, :3] - stacked.sum(1)[:, 3:] / 2


FAMILIES = {
    "deconvolution": Deconvolution, "two pools": TwoPools, "shared branch": SharedBranch, "attention": Attention,
    "causal attention": lambda: Attention(causal=True), "torch encoder": TorchEncoder, "gated": Gated,
    "functional": Functional, "grouped": Grouped, "split": Split,
    "convnet": lambda: build_model("convnet", channels=2, size=8, classes=3),
    "resnet20": lambda: build_model("resnet20", channels=2, size=8, classes=3),
    "vit": lambda: ViT(channels=2, size=8, classes=3, width=16, depth=1, heads=2, patch=4),
    "mlp": lambda: build_model("mlp", channels=2, size=8, classes=3),
}  # fmt: skip
IBP_ONLY = {"gated": "amax", "split": "maximum"}


def build(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return model, torch.rand(IMAGE, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_bounds_of_a_stranger_contain_its_outputs(name, method):
    if (name, method) == ("resnet20", "crown"):
        pytest.skip("takes minutes: every layer is bounded by passes through all before it")
    model, x = build(name)
    if name in IBP_ONLY and method != "ibp":
        with pytest.raises(NotImplementedError, match=f"{IBP_ONLY[name]}.*ibp"):
            bounds(model, x, 0.01, method=method)
        return
    traced = trace(model, x)
    for eps in (0.0, 0.002, 0.05):
        found, box = bounds(traced, x, eps, method=method), input_box(x, eps)
        with torch.no_grad():
            for seed in range(30):
                share = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
                values = model(box.lower + (share.round() if seed % 2 else share) * (box.upper - box.lower))
                assert (values >= found.lower - 1e-9 * (1 + found.lower.abs())).all()
                assert (values <= found.upper + 1e-9 * (1 + found.upper.abs())).all()
        if eps == 0:
            slack = 5e-3 if name in ("vit", "torch encoder") else 1e-6  # lines around GELU leave a little room
            assert (found.upper - found.lower).max() < slack


def test_backward_bounds_of_attention_are_tighter_than_intervals():
    model, x = build("attention")
    widths = [(b.upper - b.lower).mean().item() for b in (bounds(model, x, 0.002, method=m) for m in METHODS)]
    assert widths[2] <= widths[1] < widths[0]


def test_reparametrized_and_pruned_weights_are_read_as_they_are_used():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    parametrizations.weight_norm(net[0])
    prune.l1_unstructured(net[2], "weight", 0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    traced = trace(net, x)
    with torch.no_grad():
        net[2].weight_orig.mul_(3)
    torch.testing.assert_close(bounds(traced, x, 0.0).lower, net(x))


def test_bounds_go_on_using_the_parameters_of_the_model():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 4)
    traced = trace(net, x)
    net.load_state_dict({key: value + 1 for key, value in net.state_dict().items()})
    torch.testing.assert_close(bounds(traced, x, 0.0).lower, net(x))
    bounds(traced, x, 0.1).upper.sum().backward()
    assert net[0].weight.grad is not None


def test_a_model_that_only_export_can_trace_shares_its_parameters_too():
    model, x = build("vit")
    traced = trace(model, x)
    with torch.no_grad():
        model.head.weight.mul_(2)
        torch.testing.assert_close(bounds(traced, x[:2], 0.0).lower, model(x[:2]))


def test_tied_weights_add_their_gradients():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    net[4].weight.requires_grad_(False)
    bounds(net, torch.randn(2, 4), 0.1).upper.sum().backward()
    assert shared.weight.grad is not None
    assert net[4].weight.grad is None


def test_a_second_input_is_known_exactly():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x, index, scale=2.0):
            return self.head(torch.relu(x + self.embed(index)) * scale)

    net, x, index = Two(), torch.randn(3, 4), torch.tensor([0, 4, 2])
    for method in METHODS:
        found = bounds(net, (x, index), 0.1, method=method)
        for sign in (-0.1, 0.1):
            assert (net(x + sign, index) <= found.upper + 1e-5).all()


def test_own_operations_are_registered_with_their_bounds():
    class Cube(nn.Module):
        def forward(self, x):
            return x.pow(3) if x.sum() > -1e9 else x  # control flow that no tracer follows

    net = nn.Sequential(nn.Linear(4, 4), Cube(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError):
        bounds(net, x, 0.1)

    def constant(module, x):
        low, high = x.lower**3, x.upper**3
        return Planes(lambda t: low + 0 * t, lambda t: high + 0 * t)

    register_bound(Cube, ibp=lambda module, x: Interval(module(x.lower), module(x.upper)), crown=constant)
    for method in METHODS:
        found = bounds(net, x, 0.1, method=method)
        assert (found.lower <= net(x)).all()
        assert (found.upper >= net(x)).all()


def test_registered_functions_stay_whole():
    net = Calls()
    register_bound(twice, ibp=lambda x: Interval(2 * x.lower, 2 * x.upper))
    found = bounds(net, torch.zeros(1, 2), 1.0)
    assert found.upper.tolist() == [[2.0, 2.0]]
    with pytest.raises(NotImplementedError, match="twice"):
        bounds(net, torch.zeros(1, 2), 1.0, method="crown")


def twice(x):
    return x + x


class Calls(nn.Module):
    def forward(self, x):
        return twice(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.T.mT.T,
        lambda x: x.max(1)[0][:, None] + x.min(dim=1).values[:, None],
        lambda x: x.max(dim=1, keepdim=True).values,
        lambda x: torch.addmm(torch.ones(3, dtype=x.dtype), x, torch.ones(4, 3, dtype=x.dtype) * -1),
        lambda x: x + torch.zeros_like(x) - torch.ones_like(x),
        lambda x: F.linear(input=x, weight=torch.eye(4, dtype=x.dtype) * -2, bias=None),
        lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3, dtype=x.dtype), stride=2, padding=1).flatten(1),
        lambda x: 1 / (x.abs() + 1) - 2 ** torch.tensor(2.0),
        lambda x: x[:, [0, 2]] * x[:, 1:3],
        lambda x: torch.stack(x.unbind(1), -1).repeat(1, 2).view(x.shape[0], -1),
        lambda x: x.clone().mul_(2).sub_(1).clamp_(-0.5, 0.5),
        lambda x: x.log_softmax(1).exp(),
        lambda x: torch.cumsum(x, 1).roll(1, 1).flip(1),
        lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear").squeeze(1),
        lambda x: x.pow(2) - x**3 + x.sqrt().rsqrt() if x.dim() else x,
        lambda x: torch.minimum(x, x.flip(1)) - torch.einsum("bi,bj->bij", x, x).sum(2),
    ],
)
def test_functions_and_methods_of_tensors_have_bounds(function):
    class Calls(nn.Module):
        def forward(self, x):
            return function(x)

    x, model = torch.rand(2, 4, dtype=torch.float64) + 0.5, Calls()
    found, box = bounds(model, x, 0.2), input_box(x, 0.2)
    for seed in range(20):
        share = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        values = model(box.lower + share * (box.upper - box.lower))
        assert (values >= found.lower - 1e-9).all()
        assert (values <= found.upper + 1e-9).all()
    assert (found.upper - found.lower).max() < 30


def test_attributes_of_unknown_effect_are_refused():
    class Real(nn.Module):
        def forward(self, x):
            return x.real * 2

    with pytest.raises(NotImplementedError, match="attribute real"):
        trace(Real(), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Softshrink()), "Softshrink"),
        (nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4)), "InstanceNorm1d"),
    ],
)
def test_what_has_no_bounds_is_named_when_tracing(module, named):
    with pytest.raises(NotImplementedError, match=f"node '1' \\({named}\\)"):
        trace(module, torch.zeros(2, 4))


def test_control_flow_that_depends_on_values_is_named():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NotImplementedError, match=r"Branch cannot be traced.*torch.where"):
        trace(Branch(), torch.zeros(2, 4))


def test_memory_that_is_overwritten_through_a_view_is_refused():
    class Overwrites(nn.Module):
        def forward(self, x):
            x = x * 2
            torch.relu_(x.view(-1))
            return x

    with pytest.raises(UnsupportedOperation, match="overwritten its memory"):
        trace(Overwrites(), torch.zeros(2, 4))


def test_forward_hooks_are_refused():
    for place in ("", "0", "1"):
        net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
        net.get_submodule(place).register_forward_hook(lambda module, args, out: out + 1)
        if place == "1":  # torch.fx sees what the hook of a container does
            torch.testing.assert_close(bounds(net, torch.zeros(1, 2), 0.0).lower, net(torch.zeros(1, 2)))
            continue
        with pytest.raises(NotImplementedError, match="hooks"):
            trace(net, torch.zeros(1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_lower_the_precision_of_bounds(method):
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 16)
    plain = bounds(net, x, 0.1, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bounds(net, x, 0.1, method=method)
    assert inside.lower.dtype == torch.float32
    torch.testing.assert_close(inside.lower, plain.lower, rtol=0, atol=0)
    half = bounds(net.bfloat16(), x.bfloat16(), 0.1, method=method)
    assert half.lower.dtype == torch.float32


_PRECISION = """
import torch
from torch import nn
from weightsmith.certify import bounds
from weightsmith.certify.precision import full_precision

torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)), torch.randn(32, 256)
expected = [bounds(net, x, 0.01, method=method) for method in ("ibp", "crown-ibp", "crown")]
{lower}
before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
for method, wanted in zip(("ibp", "crown-ibp", "crown"), expected):
    torch.testing.assert_close(bounds(net, x, 0.01, method=method).lower, wanted.lower, rtol=1e-5, atol=1e-5)
with full_precision("cuda"):
    assert torch.backends.cudnn.conv.fp32_precision == "ieee" or not torch.backends.cudnn.allow_tf32
assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
assert torch.backends.cudnn.conv.fp32_precision == "tf32"
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize(
    "lower",
    [
        "torch.set_float32_matmul_precision('medium')",  # products of bfloat16 numbers, on a CPU that has them
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'; torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    ],
)
def test_lower_precision_of_float32_products_does_not_reach_bounds(lower):
    """In a process of its own: torch cannot take back which of its two ways was used."""
    subprocess.run([sys.executable, "-c", _PRECISION.format(lower=lower)], check=True)


@pytest.mark.slow
def test_compiled_bounds_are_the_same():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
    traced = trace(net, x)
    compiled = torch.compile(lambda x: bounds(traced, x, 0.1, options=BoundOptions()).lower, backend="eager")
    torch.testing.assert_close(compiled(x), bounds(traced, x, 0.1).lower)
