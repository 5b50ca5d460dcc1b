import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.lab.models.vit import Attention, Mlp
from weightsmith.quantize.in_training.attention_parts import find_parts
from weightsmith.quantize.in_training.cache import cached_weights
from weightsmith.quantize.in_training.finish import integer_weights
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_, reparameterize_qk_
from weightsmith.quantize.in_training.qkr import query_key_bias, query_key_product

GOLDEN = load_file("tests/golden/ofq.safetensors")
quiet = pytest.mark.filterwarnings("ignore:the biases of query and key")
LINEAR = {
    "move_b4.bias": "input_quantizer.before",
    "move_aft.bias": "input_quantizer.after",
    "input_quant_fn.s": "input_quantizer.scale",
    "lsqw_fn.s": "parametrizations.weight.0.scale",
    "weight": "parametrizations.weight.original",
    "bias": "bias",
}
ATTENTION = {
    "q.weight": "q.weight",
    "k.weight": "k.weight",
    "quant_x_4_qkv.move_b4.bias": "input_quantizer.before",
    "quant_x_4_qkv.move_aft.bias": "input_quantizer.after",
    "quant_x_4_qkv.input_quant_fn.s": "input_quantizer.scale",
    "qkv.move_b4.bias": "input_quantizer.before",
    "qkv.move_aft.bias": "input_quantizer.after",
    "qkv.input_quant_fn.s": "input_quantizer.scale",
    "move_qkx_b4.bias": "product_shift",
    "quan_a_qkx_fn.s": "product_quantizer.scale",
    "quan_a_q_fn.s": "query_quantizer.scale",
    "quan_a_k_fn.s": "key_quantizer.scale",
    "quan_a_v_fn.s": "value_quantizer.scale",
    "move_q_aft.bias": "query_quantizer.after",
    "move_k_aft.bias": "key_quantizer.after",
    "move_v_b4.bias": "value_quantizer.before",
    "move_v_aft.bias": "value_quantizer.after",
    "quan_a_softmax_fn.s": "softmax_quantizer.scale",
    "relative_position_bias_table": "relative_position_bias_table",
}


def ours(name, thirds):
    """The parameters that hold one of the authors' parameters, with the part that each holds."""
    if name == "move_qkv_b4.bias":
        return [
            (f"{role}_quantizer.before", part) for role, part in zip(("query", "key", "value"), thirds, strict=True)
        ]
    if name in ATTENTION:
        return [(ATTENTION[name], slice(None))]
    suffix = max((suffix for suffix in LINEAR if name == suffix or name.endswith(f".{suffix}")), key=len)
    return [(name[: -len(suffix)] + LINEAR[suffix], slice(None))]


def compare(case, model, prefix="", width=8):
    """Load the authors' parameters, compare output and all gradients; return the largest difference."""
    thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
    x, up = GOLDEN[f"{case}/in/x"].clone().requires_grad_(), GOLDEN[f"{case}/in/g"]
    calibrate_(model, x.detach())
    held = {name.removeprefix(prefix): parameter for name, parameter in model.named_parameters()}
    loaded = set()

    def each(kind):
        for key, value in GOLDEN.items():
            # the shift behind the query-key product cannot matter: it moves every logit of a row by the same amount
            if key.startswith(f"{case}/{kind}/") and "move_qkx_aft" not in key:
                for name, part in ours(key.rpartition("/")[2], thirds):
                    yield name, value[part]

    with torch.no_grad():
        for name, value in each("param"):
            held[name].copy_(value)
            loaded.add(name)
    assert loaded == set(held)
    y = model(x)
    y.backward(up)
    pairs = [(y, GOLDEN[f"{case}/out/y"]), (x.grad, GOLDEN[f"{case}/out/grad_x"])]
    pairs += [(held[name].grad, value) for name, value in each("grad")]
    return max((left - right).abs().max().item() for left, right in pairs)


class Separate(nn.Module):
    """Attention with three projections, of which only the weights matter here."""

    def __init__(self, width, heads, bias=False):
        super().__init__()
        self.num_heads = heads
        self.q, self.k = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        heads = (self.num_heads, -1)
        q, k, v = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        logits = logits if mask is None else logits + mask
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Windowed(Separate):
    """With the relative position bias of Swin, in windows of 3 x 3."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(25, heads))
        at = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + 2
        self.relative_position_index = apart[0] * 5 + apart[1]

    def forward(self, x, mask=None):
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        mask = 0 if mask is None else mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        return super().forward(x, bias + mask)


class Shifted(nn.Module):
    """Cuts 6 x 6 images, rolled by one, into windows and hides what the roll has brought together."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        region = torch.tensor([0, 0, 0, 1, 1, 2])
        regions = self.windows((3 * region[:, None] + region)[None, :, :, None])[..., 0]
        mask = torch.where(regions[:, None] != regions[:, :, None], -100.0, 0.0).to(x.dtype)
        y = self.inner(self.windows(x.roll((-1, -1), (1, 2))), mask)
        return y.view(len(x), 2, 2, 3, 3, -1).transpose(2, 3).reshape(x.shape).roll((1, 1), (1, 2))

    @staticmethod
    def windows(x):
        return x.view(len(x), 2, 3, 2, 3, -1).transpose(2, 3).reshape(len(x) * 4, 9, -1)


@pytest.mark.parametrize(("case", "bits"), [("qlinear/w2a2", 2), ("qlinear/w4a4", 4)])
def test_a_linear_layer_is_the_authors_one(case, bits):
    # the second sits behind an activation, so its input is unsigned
    model = nn.Sequential(nn.Identity() if bits == 2 else nn.GELU(), nn.Linear(12, 7)).double()
    prepare_ofq_(model, weight_bits=bits, activation_bits=bits, ends_bits=None)
    model[0] = nn.Identity()
    assert compare(case, model, prefix="1.") < 1e-9


def test_a_perceptron_is_the_authors_one():
    assert compare("qmlp/w2a2", prepare_ofq_(Mlp(8, 16).double(), ends_bits=None)) < 1e-9


@pytest.mark.parametrize("weight", ["statsq", "lsq"])
def test_attention_without_reparameterization_is_the_authors_one(weight):
    model = prepare_ofq_(Attention(8, 2).double(), ends_bits=None, qk_reparam=False, weight=weight)
    assert compare(f"{weight}_attn/w2a2", model) < 1e-9


def test_reparameterized_attention_is_the_authors_one():
    assert compare("qkr_attn/w2a2", prepare_ofq_(Separate(16, 4).double(), ends_bits=None)) < 1e-9


def test_reparameterized_window_attention_is_the_authors_one():
    model = Shifted(prepare_ofq_(Windowed(12, 3).double(), ends_bits=None))
    assert compare("qkr_swin/w2a2", model, prefix="inner.") < 1e-9


@quiet
def test_the_product_and_its_gradients_are_those_of_plain_operations():
    torch.manual_seed(0)
    wq, wk = (torch.randn(8, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    up = torch.randn(24, 6, dtype=torch.float64)
    attention = Separate(6, 2)
    attention.q, attention.k, attention.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
    attention.num_heads, attention.proj = 4, nn.Linear(8, 6)
    prepare_ofq_(attention.double(), weight_bits=8, activation_bits=None, ends_bits=None)
    for made in (query_key_product(wq, wk, 4), attention.product(wq, wk)):
        grads = torch.autograd.grad(made, (wq, wk), up)
        q, k, g = wq[2:4], wk[2:4], up[6:12]  # of the second head
        assert torch.allclose(grads[0][2:4], k @ g.T, atol=1e-12)
        assert torch.allclose(grads[1][2:4], q @ g, atol=1e-12)


def test_few_key_heads_serve_many_query_heads():
    wq, wk = torch.randn(8, 6), torch.randn(4, 6)
    repeated = wk.unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)
    assert torch.equal(query_key_product(wq, wk, 4), query_key_product(wq, repeated, 4))


def test_query_and_key_may_see_different_inputs():
    wq, wk = torch.randn(8, 6), torch.randn(8, 5)
    x, y = torch.randn(3, 6), torch.randn(4, 5)
    product = query_key_product(wq, wk, 2).unflatten(0, (2, 6))
    q, k = (x @ wq.T).unflatten(-1, (2, 4)), (y @ wk.T).unflatten(-1, (2, 4))
    assert torch.allclose(torch.einsum("ihd,jhd->hij", q, k), x @ product @ y.T, atol=1e-4)


@pytest.mark.parametrize(("rows", "heads"), [(8, 3), (8, 0)])
def test_heads_that_do_not_divide_are_refused(rows, heads):
    with pytest.raises(UsageError, match="heads must divide"):
        query_key_product(torch.ones(rows, 4), torch.ones(rows, 4), heads)


def softmax_of(attention, x):
    found = []
    attention.value_quantizer = lambda v: v
    attention._dropped = lambda weights: found.append(weights) or weights
    attention(x)
    return found[0]


@pytest.mark.parametrize("fused", [True, False])
def test_without_rounding_the_logits_stay_and_the_query_bias_can_be_kept(fused):
    torch.manual_seed(0)
    original = Attention(8, 2) if fused else Separate(8, 2, bias=True)
    x = torch.randn(3, 5, 8)
    for layer in original.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias)
    expected = original(x)
    prepared = prepare_ofq_(
        copy.deepcopy(original), weight_bits=8, activation_bits=None, ends_bits=None, keep_query_bias=True
    )
    prepared.product.quantizer = nn.Identity()
    for layer in list(prepared.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.allclose(prepared(x), expected, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_dropping_a_query_bias_is_said_once(fused):
    model = Attention(8, 2) if fused else Separate(8, 2, bias=True)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias)
    with pytest.warns(WeightsmithWarning, match="keep_query_bias=True") as caught:
        prepare_ofq_(model, ends_bits=None)
    assert len(caught) == 1
    assert torch.equal(model.qkv.bias[:16], torch.zeros(16)) if fused else model.q.bias is None


def test_what_the_query_bias_adds_is_a_vector_per_head():
    wk, bias, x = torch.randn(8, 6), torch.randn(8), torch.randn(5, 6)
    expected = ((x @ wk.T) * bias).unflatten(-1, (2, 4)).sum(-1)
    assert torch.allclose(x @ query_key_bias(bias, wk, 2).T, expected, atol=1e-5)


class Between(Separate):
    def __init__(self, **extra):
        super().__init__(8, 2)
        for name, value in extra.items():
            setattr(self, name, value)


class Rotary(Separate):
    def forward(self, x, position_embeddings=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Between(q_norm=nn.LayerNorm(4)), "normalized"),
        (lambda: Between(logit_scale=nn.Parameter(torch.ones(2, 1, 1))), "cosines"),
        (lambda: Between(rotary_emb=nn.Module()), "rotary"),
        (lambda: Rotary(8, 2), "rotary"),
    ],
)
def test_reparameterization_is_refused_where_something_lies_between(make, reason):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=f'{reason}.*qk_reparam="auto"'):
        prepare_ofq_(model, qk_reparam=True)
    assert model.state_dict().keys() == before.keys()
    with pytest.warns(WeightsmithWarning, match="stays in floating point"):
        prepare_ofq_(model, ends_bits=None)
    assert {"q.weight", "k.weight", "v.weight", "proj.weight"} == integer_weights(model).keys()


def test_an_identity_in_the_place_of_a_norm_is_no_obstacle():
    prepare_ofq_(Between(q_norm=nn.Identity(), k_norm=nn.Identity()))


@quiet
def test_unusual_names_can_be_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.asks, self.answers, self.gives, self.ends = (nn.Linear(8, 8) for _ in range(4))
            self.many = 2

        def forward(self, x):
            q, k, v = (
                layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.asks, self.answers, self.gives)
            )
            return self.ends(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    names = {"q": "asks", "k": "answers", "v": "gives", "out": "ends", "heads": "many"}
    assert find_parts("", Odd(), names).heads == 2
    model = reparameterize_qk_(Odd(), attention_names=names)
    assert calibrate_(model, torch.randn(2, 3, 8))(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    with pytest.raises(UsageError, match="matches nothing"):
        reparameterize_qk_(Odd())
    with pytest.raises(UsageError, match="no role 'query'; known: 'qkv', 'q'"):
        prepare_ofq_(Odd(), attention_names={"query": "asks"})
    with pytest.raises(UsageError, match="fits no module"):
        prepare_ofq_(Odd(), attention_names={"q": "nothing", "k": "answers", "v": "gives"})


@pytest.mark.parametrize(("heads", "message"), [(3, "do not divide its width 8"), ("two", "number of heads")])
def test_heads_must_be_a_number_that_divides_the_width(heads, message):
    with pytest.raises(UsageError, match=message):
        prepare_ofq_(Between(num_heads=heads), qk_reparam=True)
    with pytest.warns(WeightsmithWarning, match=message):
        prepare_ofq_(model := Between(num_heads=heads))
    assert type(model) is Between


@quiet
def test_attention_of_older_libraries_returns_its_pair_and_honors_masks():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_attention_heads = 2
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
            self.dropout = nn.Dropout(0.5)

        def forward(self, hidden_states, attention_mask=None, head_mask=None):
            heads = (2, 4)
            q, k, v = (
                layer(hidden_states).unflatten(-1, heads).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            logits = q @ k.transpose(-1, -2) / 2
            if attention_mask is not None:
                hide = attention_mask.dtype == torch.bool
                logits = logits.masked_fill(~attention_mask, -1e9) if hide else logits + attention_mask
            weights = self.dropout(logits.softmax(-1))
            weights = weights if head_mask is None else weights * head_mask
            return (weights @ v).transpose(1, 2).flatten(2), weights

    torch.manual_seed(0)
    model = SelfAttention()
    prepare_ofq_(model, activation_bits=None, ends_bits=None)
    x = torch.randn(2, 5, 8)
    hidden = torch.tensor([[True, True, True, False, False]])[:, None, None]
    out, weights = model.eval()(x, hidden)
    assert out.shape == x.shape
    assert weights[..., 3:].abs().max() == 0
    assert torch.allclose(weights, model(x, torch.where(hidden, 0.0, -1e9))[1], atol=1e-6)
    assert model(x, None, torch.tensor([1.0, 0.0])[:, None, None])[0][..., 4:].abs().max() == 0
    assert (model.train()(x)[1] == 0).any()
    with pytest.raises(UsageError, match=r"a mask must be .* got \(2, 5\)"):
        model(x, torch.ones(2, 5))


def test_a_cache_or_another_source_is_refused():
    class Cross(Separate):
        def forward(self, x, encoder_hidden_states=None):
            return super().forward(x)

    x = torch.randn(2, 3, 8)
    model = calibrate_(prepare_ofq_(Cross(8, 2), example=x), x)
    with pytest.raises(UsageError, match="encoder_hidden_states must be None"):
        model(torch.randn(2, 3, 8), torch.randn(2, 4, 8))
    with pytest.raises(UsageError, match=r"\(batch, tokens, channels\)"):
        model(torch.randn(3, 8))


@quiet
def test_the_product_is_made_once_within_cached_weights_and_trains_both_weights():
    torch.manual_seed(0)
    model = calibrate_(prepare_ofq_(Attention(8, 2), ends_bits=None), torch.randn(2, 5, 8))
    x, grads = torch.randn(2, 5, 8), []
    for cached in (False, True):
        model.zero_grad()
        with cached_weights(model) if cached else torch.enable_grad():
            outs = [model(x) for _ in range(2)]
            for out in outs:
                out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))
    assert model.qkv.parametrizations.weight.original.grad[:16].abs().sum() > 0


@quiet
def test_under_autocast_the_product_is_computed_in_float32():
    model = calibrate_(prepare_ofq_(Attention(8, 2), ends_bits=None), torch.randn(2, 5, 8))
    expected = model.product(*model.query_key_weights())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.product(*model.query_key_weights()), expected)
        assert model(torch.randn(2, 5, 8)).isfinite().all()
