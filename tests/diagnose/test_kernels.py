"""Three ways to one kernel, on architectures that were not written here."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from weightsmith.core.errors import UsageError
from weightsmith.diagnose import KernelOptions, plan_kernel, tangent_kernel


def one_by_one(model, inputs, params=lambda name: True, outputs=lambda out: out, batch_dim=0):
    """The kernel as its definition says: a backward pass per output of each sample."""
    model.eval()
    weights = [p for name, p in model.named_parameters() if p.requires_grad and params(name)]
    call = (
        {"args": inputs}
        if isinstance(inputs, tuple)
        else {"kwargs": inputs}
        if isinstance(inputs, dict)
        else {"args": (inputs,)}
    )
    rows = []
    out = outputs(model(*call.get("args", ()), **call.get("kwargs", {}))).movedim(batch_dim, 0)
    out = (torch.view_as_real(out) if out.is_complex() else out).flatten(1)
    for value in out.flatten():
        grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
        rows.append(torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in pieces]))
    j = torch.stack(rows).double()
    return j @ j.T


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        h, state = self.rnn(x)
        return self.head(h[:, -1]), state


@dataclasses.dataclass
class Result:
    scores: torch.Tensor
    hidden: torch.Tensor


class Dataclasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x.transpose(0, 1))[0]
        return Result(self.second(h[-1]), h)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.middle = nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.middle(self.embed(ids)))).mean(1)


class ComplexHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))

    def forward(self, x):
        return torch.tanh(self.body(x)).to(self.head.dtype) @ self.head


class Twice(nn.Module):
    """One layer used twice, functionally and as a module, on sequences as long as the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.shared(torch.tanh(self.first(x))))
        return nn.functional.linear(h, self.shared.weight, self.shared.bias).sum(1)


class Grown(nn.Module):
    """Weights used in ways that no layer knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(torch.sin(x @ self.a) * self.b) + self.layer.weight.sum()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.attend(x)[:, 0]


def frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.GELU(),
        nn.Conv2d(4, 4, 1, groups=2), nn.Dropout(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def cell():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(4, 2))
    )


def both_ways():
    return nn.RNN(3, 2, bidirectional=True)


def translator():
    return nn.Transformer(4, 2, 1, 1, 8, batch_first=True)


def batch_statistics():
    return nn.BatchNorm1d(2, track_running_stats=False)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MODELS = {
    "tuples, LSTM": (Tuples, rows(4, 5, 3), {}, lambda out: out[0]),
    "dataclass, GRU": (Dataclasses, rows(4, 5, 3), {}, lambda out: out.scores),
    "tied": (Tied, torch.tensor([[1, 2, 3], [3, 4, 0], [6, 6, 5]]), {}, None),
    "complex head": (ComplexHead, rows(4, 3), {}, None),
    "used twice": (Twice, rows(4, 4, 3), {}, None),
    "grown": (Grown, rows(4, 3), {}, None),
    "attention": (Attention, rows(3, 4, 4), {}, None),
    "frozen": (frozen, rows(4, 3), {}, None),
    "convolutions": (convolutions, rows(3, 2, 6, 6)[..., :4, :4], {}, None),
    "parametrized": (cell, rows(4, 3), {}, None),
    "RNN, time first": (both_ways, rows(3, 4, 3), {"batch_dim": 1}, lambda out: out[0]),
    "transformer layers": (translator, (rows(3, 2, 4), rows(3, 2, 4)), {}, None),
}  # fmt: skip


def made(name):
    build, inputs, options, outputs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    return (
        (
            model
            if name == "complex head" and model.double() is None
            else model.to(torch.float64)
            if name != "complex head"
            else _real(model)
        ),
        inputs,
        options,
        outputs or (lambda out: out),
    )


def _real(model):
    model.body.double()
    return model


@pytest.mark.parametrize("method", ["jacobian", "contract"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_that_of_one_backward_pass_per_output(name, method):
    model, inputs, options, outputs = made(name)
    expected = one_by_one(model, inputs, outputs=outputs, **options)
    kernel = tangent_kernel(model, inputs, options=KernelOptions(method=method), **options)
    torch.testing.assert_close(kernel.matrix, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_sketch_is_near_the_kernel(name):
    model, inputs, options, outputs = made(name)
    expected = one_by_one(model, inputs, outputs=outputs, **options)
    kernel = tangent_kernel(model, inputs, options=KernelOptions(method="sketch", probes=600), **options)
    error = torch.linalg.norm(kernel.matrix - expected) / torch.linalg.norm(expected)
    assert error < 3 * (expected.trace() / torch.linalg.norm(expected) + 1) / 600**0.5


def test_what_linear_layers_hold_needs_no_jacobian():
    shares = {}
    for name in ("used twice", "convolutions", "tied", "grown"):
        model, inputs, options, _ = made(name)
        shares[name] = plan_kernel(model, inputs, options=KernelOptions(method="contract"), **options).contracted
    assert shares["used twice"] == 1.0
    assert 0.5 < shares["convolutions"] < 1.0
    assert 0 < shares["tied"] < 0.5  # the shared table is looked up too
    assert 0 < shares["grown"] < 0.5


@pytest.mark.parametrize("name", ["GPT2", "Bert", "Llama", "ViT", "T5", "Mamba"])
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    text = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
        model, inputs = transformers.GPT2LMHeadModel(config), {"input_ids": ids}
    elif name == "Bert":
        config = transformers.BertConfig(**text, intermediate_size=8, num_labels=3)
        model, inputs = transformers.BertForSequenceClassification(config), {"input_ids": ids, "return_dict": True}
    elif name == "Llama":
        config = transformers.LlamaConfig(**text, intermediate_size=8, max_position_embeddings=8)
        model, inputs = transformers.LlamaForCausalLM(config), {"input_ids": ids, "use_cache": False}
    elif name == "ViT":
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2,
            num_labels=3,
        )  # fmt: skip
        model, inputs = transformers.ViTForImageClassification(config), torch.randn(2, 3, 4, 4)
    elif name == "T5":
        config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model, inputs = transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}
    else:
        config = transformers.MambaConfig(
            vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1, time_step_rank=2
        )
        model, inputs = transformers.MambaForCausalLM(config), {"input_ids": ids}
    expected = one_by_one(model, inputs if isinstance(inputs, dict) else (inputs,), outputs=lambda out: out.logits)
    for method in ("jacobian", "contract"):
        found = tangent_kernel(model, inputs, options=KernelOptions(method=method)).matrix
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from(["jacobian", "contract"]),
)
@settings(max_examples=25, deadline=None)
def test_no_budget_changes_the_numbers(samples, width, outputs, seed, method):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    x = torch.randn(samples, 3, dtype=torch.float64)
    expected = one_by_one(model, x)
    least = 8 * 2 * (samples * outputs) ** 2  # the kernels themselves must fit
    for budget in (least, 10 * least, 2**30):
        found = tangent_kernel(model, x, options=KernelOptions(method=method, budget=budget)).matrix
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("method", ["jacobian", "contract", "sketch"])
def test_trace_and_random_are_what_they_say(method):
    model, inputs, _, outputs = made("used twice")
    full = one_by_one(model, inputs, outputs=outputs).view(4, 4, 4, 4)
    near = {"rtol": 1e-8, "atol": 1e-10} if method != "sketch" else {"rtol": 0.5, "atol": 0.5 * float(full.abs().max())}
    made_with = {"method": method, "probes": 600 if method == "sketch" else 3}
    trace = tangent_kernel(model, inputs, options=KernelOptions(reduce="trace", **made_with)).matrix
    torch.testing.assert_close(trace, torch.einsum("akbk->ab", full), **near)
    random = tangent_kernel(model, inputs, options=KernelOptions(reduce="random", seed=4, **made_with)).matrix
    r = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(random, torch.einsum("ak,akbl,bl->ab", r, full, r), **near)


def test_a_sketched_alignment_is_unbiased_and_knows_its_error():
    torch.manual_seed(0)
    before, after = (nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 2)).double() for _ in range(2))
    x = rows(12, 5)
    exact = tangent_kernel(before, x).alignment(tangent_kernel(after, x))[0]
    found = []
    for seed in range(30):
        options = KernelOptions(method="sketch", probes=64, seed=seed)
        found.append(tangent_kernel(before, x, options=options).alignment(tangent_kernel(after, x, options=options)))
    values, errors = torch.tensor(found).T
    assert abs(values.mean() - exact) < 4 * values.std() / 30**0.5 + 0.01
    assert 0.5 < errors.mean() / values.std() < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 3)
    expected = one_by_one(model, x)
    kernel = tangent_kernel(model.to(dtype), x.to(dtype))
    assert kernel.matrix.dtype == torch.float32
    torch.testing.assert_close(kernel.matrix.double(), expected, rtol=0.1, atol=0.1)
    wide = tangent_kernel(model, x.to(dtype), options=KernelOptions(dtype=torch.float64))
    assert wide.matrix.dtype == torch.float64


def test_the_plan_comes_first_and_says_how_much():
    model = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    x = torch.randn(20, 50)
    plan = plan_kernel(model, x)
    assert (plan.method, plan.rows, plan.parameters) == ("jacobian", 200, 12210)
    assert plan.memory >= 200 * 12210 * 4
    small = plan_kernel(model, x, options=KernelOptions(budget=2_000_000))
    assert small.method == "contract"
    assert small.memory <= 2_000_000
    tiny = plan_kernel(model, x, options=KernelOptions(budget=100_000))
    assert tiny.method == "sketch"
    for found in (plan, small, tiny):
        assert "samples" in str(found)
        assert " s" in str(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: tangent_kernel(m, x, options=KernelOptions(method="jacobian", budget=100)), "reduce='trace'"),
        (lambda m, x: tangent_kernel(m, x, params="nothing"), "matches no parameter"),
        (lambda m, x: tangent_kernel(m, x, outputs=lambda out: out.sum()), r"outputs must return \(N, O\)"),
        (lambda m, x: tangent_kernel(m, x, outputs=lambda out: out.argmax(1)), "no derivative"),
        (lambda m, x: tangent_kernel(m, x, batch_dim=4), "inputs must hold samples"),
        (lambda m, x: tangent_kernel(m, {}), "inputs must hold samples"),
        (lambda m, x: tangent_kernel(m.requires_grad_(False), x), "matches no parameter"),
        (lambda m, x: tangent_kernel(nn.Sequential(m, batch_statistics()), x), "batch statistics"),
        (lambda m, x: tangent_kernel(nn.Sequential(m, nn.InstanceNorm1d(2), nn.Softmax(0)), x), "depend on the others"),
        (lambda m, x: tangent_kernel(m.to("meta"), x), "meta"),
        (lambda m, x: KernelOptions(method="fast"), "method 'fast' is not known"),
        (lambda m, x: KernelOptions(reduce="mean"), "reduce 'mean' is not known"),
        (lambda m, x: KernelOptions(probes=2), "probes must be at least 3"),
        (lambda m, x: KernelOptions(budget=0), "budget must be"),
        (lambda m, x: KernelOptions(dtype=torch.float16), "dtype must be"),
        (lambda m, x: tangent_kernel(m, x).alignment(tangent_kernel(m, x[:2])), "equal samples"),
        (
            lambda m, x: tangent_kernel(m, x).alignment(tangent_kernel(m, x, options=KernelOptions(method="sketch"))),
            "equal method",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3))


def test_frozen_parameters_count_when_asked_for():
    model = frozen()
    x = torch.randn(3, 3)
    left_out = tangent_kernel(model, x)
    everything = tangent_kernel(model, x, params="*")
    assert everything.plan.parameters - left_out.plan.parameters == 12
    assert not model[0].weight.requires_grad


class LastStep(nn.Module):
    """Positions first, and only the last one is read, as a recurrent model on sequences does."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.into(x.transpose(0, 1)))[-1])


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_as_many_positions_as_samples_are_not_taken_for_samples(samples):
    torch.manual_seed(0)
    model, x = LastStep().double(), torch.randn(samples, 5, 3, dtype=torch.float64)
    kernel = tangent_kernel(model, x, options=KernelOptions(method="contract"))
    assert kernel.plan.contracted == 1
    torch.testing.assert_close(kernel.matrix, one_by_one(model, x))


class Routed(nn.Module):
    """An expert that gets as many tokens as there are samples: one of the first and of the last, two of another."""

    def __init__(self):
        super().__init__()
        self.into, self.expert, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.into(x)
        tokens, chosen = h.flatten(0, 1), (x[..., 0] > 0).flatten()
        expert = torch.zeros_like(tokens).index_add(0, chosen.nonzero()[:, 0], torch.tanh(self.expert(tokens[chosen])))
        return self.out(expert.view_as(h).mean(1))


def test_as_many_tokens_as_samples_are_not_taken_for_samples():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(4, 3, 3, dtype=torch.float64)
    x[..., 0] = torch.tensor([[1, -1, -1], [1, 1, -1], [-1, -1, -1], [-1, -1, 1]])
    kernel = tangent_kernel(model, x, options=KernelOptions(method="contract"))
    torch.testing.assert_close(kernel.matrix, one_by_one(model, x))
