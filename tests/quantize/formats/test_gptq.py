import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize.after_training.activations import quantize_activations_
from weightsmith.quantize.after_training.verbs import round_to_nearest_
from weightsmith.quantize.formats import gptq
from weightsmith.quantize.formats.export import load_quantized, save_quantized
from weightsmith.quantize.grid import Grid, QuantizedWeight, quantized_weights, write_quantized_

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flexround.safetensors")
PROJECTION = "model.layers.0.mlp.up_proj"


def llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes})).to(dtype).eval()


def rounded(grid, model=None, where=None):
    model = llama() if model is None else model
    round_to_nearest_(model, None, grid, where=where)
    return model


def grid_of(bits=4, granularity="channel", symmetric=False):
    return Grid(bits, granularity=granularity, symmetric=symmetric, search="minmax")


def assert_same(left, right):
    assert (left.bits, left.symmetric, left.granularity) == (right.bits, right.symmetric, right.granularity)
    for one, other in zip(
        (left.codes, left.scale, left.zero_point), (right.codes, right.scale, right.zero_point), strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_layout_is_that_of_the_reference_values():
    truth = {name.removeprefix("pack4."): tensor for name, tensor in GOLDEN.items() if name.startswith("pack4.")}
    codes, zero = truth["codes"].to(torch.uint8), truth["zero_point"].T.contiguous().to(torch.uint8)
    quantized = QuantizedWeight(codes, truth["scale"].T.contiguous(), zero, 4, False, 8)
    parts = gptq.pack(quantized, "gptq")
    assert torch.equal(parts["qweight"], truth["qweight"])
    assert torch.equal(parts["qzeros"], truth["qzeros_minus1"])
    assert torch.equal(parts["scales"], truth["scale"])
    assert parts["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert {part: tensor.dtype for part, tensor in parts.items() if part != "scales"} == dict.fromkeys(
        ("qweight", "qzeros", "g_idx"), torch.int32
    )
    assert torch.equal(gptq.unpack(parts, "gptq", 4, 8, symmetric=False).dequantize(), truth["dequant"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_a_bit_stream_down_the_inputs_and_along_the_outputs(bits):
    """Python's unbounded integers are the peer: the stream of a column is one number, cut into 32-bit words."""
    generator = torch.Generator().manual_seed(bits)
    codes, zero = (torch.randint(2**bits, s, generator=generator, dtype=torch.uint8) for s in ((64, 32), (64, 2)))
    quantized = QuantizedWeight(codes, torch.ones(64, 2), zero, bits, False, 16)
    parts = gptq.pack(quantized, "gptq")

    def words(values):
        number = sum(int(value) << bits * place for place, value in enumerate(values))
        return np.frombuffer(number.to_bytes(len(values) * bits // 8, "little"), dtype="<i4").tolist()

    assert parts["qweight"].T.tolist() == [words(row) for row in codes]
    assert parts["qzeros"].tolist() == [words((zero[:, group].int() - 1) % 2**bits) for group in range(2)]
    assert gptq.pack(quantized, "gptq_v2")["qzeros"].tolist() == [words(zero[:, group]) for group in range(2)]


@st.composite
def weights(draw):
    bits = draw(st.sampled_from(gptq.BITS))
    whole = 32 if bits == 3 else 32 // bits
    rows, columns = whole * draw(st.integers(1, 3)), whole * draw(st.integers(1, 3))
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    granularity = draw(st.sampled_from(["channel", *divisors]))
    groups = 1 if granularity == "channel" else columns // granularity
    symmetric, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, kind = (-(2 ** (bits - 1)), torch.int8) if symmetric else (0, torch.uint8)
    codes = torch.randint(low, low + 2**bits, (rows, columns), generator=generator).to(kind)
    zero = torch.randint(1 if symmetric else 2**bits, (rows, groups), generator=generator).to(kind)  # 0 wraps
    scale = torch.rand(rows, groups, generator=generator).to(dtype)
    return QuantizedWeight(codes, scale, zero, bits, symmetric, granularity)


@given(weights(), st.sampled_from(["gptq", "gptq_v2"]))
@settings(max_examples=40, deadline=None)
def test_packing_loses_nothing(quantized, form):
    group_size = quantized.group_size or -1
    parts = gptq.pack(quantized, form)
    back = gptq.unpack(parts, form, quantized.bits, group_size, symmetric=quantized.symmetric)
    assert_same(back, quantized)


def test_a_zero_point_of_0_wraps_to_the_largest_word():
    quantized = QuantizedWeight(
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.ones(8, 1),
        torch.zeros(8, 1, dtype=torch.uint8),
        4,
        False,
        "channel",
    )
    assert gptq.pack(quantized, "gptq")["qzeros"].tolist() == [[-1]]  # eight times 15


def test_codes_said_to_be_symmetric_stay_unsigned_where_the_zero_point_is_elsewhere():
    zero = torch.full((8, 1), 7, dtype=torch.uint8)
    codes = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
    quantized = QuantizedWeight(codes, torch.ones(8, 1), zero, 4, False, "channel")
    assert_same(gptq.unpack(gptq.pack(quantized, "gptq"), "gptq", 4, -1, symmetric=True), quantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("bits", "granularity", "symmetric"),
    [(2, 16, False), (3, "channel", True), (3, 32, False), (4, 32, True), (4, "channel", False), (8, "channel", True)],
)
def test_a_language_model_comes_back_bit_for_bit(tmp_path, bits, granularity, symmetric, dtype):
    model = rounded(grid_of(bits, granularity, symmetric), llama(dtype))
    save_quantized(model, tmp_path / "out", "gptq")
    loaded = load_quantized(tmp_path / "out")
    before, after = quantized_weights(model), quantized_weights(loaded)
    assert list(before) == list(after)
    for name, quantized in before.items():
        assert_same(after[name], quantized)
    state = loaded.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_all_is_repeated_for_every_channel(tmp_path, symmetric):
    model = rounded(grid_of(4, "tensor", symmetric))
    save_quantized(model, tmp_path / "out", "gptq")
    loaded = load_quantized(tmp_path / "out")
    for name, quantized in quantized_weights(model).items():
        held = quantized_weights(loaded)[name]
        assert held.granularity == "channel"
        assert torch.equal(held.codes, quantized.codes)
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


def test_biases_stay_beside_the_words(tmp_path):
    model = llama(attention_bias=True)
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    save_quantized(rounded(grid_of(), model), tmp_path / "out", "gptq")
    bias = load_quantized(tmp_path / "out").model.layers[0].self_attn.q_proj.bias
    assert torch.equal(bias, model.model.layers[0].self_attn.q_proj.bias)


@pytest.mark.parametrize(("granularity", "group_size"), [("channel", -1), (16, 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_both_configurations_say_the_same(tmp_path, granularity, group_size, symmetric):
    save_quantized(rounded(grid_of(4, granularity, symmetric)), tmp_path / "out", "gptq")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert facts == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert facts == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "dynamic": {"-:^lm_head$": {}},
    }


def test_layers_that_were_left_out_are_named_in_the_configuration_and_kept(tmp_path):
    model = rounded(grid_of(), llama(tie_word_embeddings=False), where=["lm_head", "*.layers.0.*", "!*.up_proj"])
    save_quantized(model, tmp_path / "out", "gptq")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert facts["lm_head"]
    assert len(facts["dynamic"]) == 1 + 7
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in facts["dynamic"]
    loaded = load_quantized(tmp_path / "out")
    assert list(quantized_weights(loaded)) == list(quantized_weights(model))
    assert torch.equal(loaded.get_parameter(f"{PROJECTION}.weight"), model.get_parameter(f"{PROJECTION}.weight"))


def test_auto_still_means_the_form_that_transformers_loads_alone(tmp_path):
    save_quantized(rounded(grid_of()), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert facts["quant_method"] == "compressed-tensors"


def half_integers():
    model = llama()
    layer = model.get_submodule(PROJECTION)
    parts = torch.zeros(layer.weight.shape, dtype=torch.int8), torch.ones(96, 1), torch.zeros(96, 1, dtype=torch.int8)
    write_quantized_(layer, QuantizedWeight(*parts, 4, True, "channel", 0, 0.5))
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return rounded(
        grid_of(), GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    )


REFUSED = {
    "not a transformers model": lambda: rounded(grid_of(), nn.Sequential(nn.Linear(32, 32))),
    "belongs to a Conv1D, not to a Linear": gpt2,
    "on a grid of half integers": half_integers,
    "different kinds of grid": lambda: rounded(grid_of(8), rounded(grid_of(), where="*.0.*"), where="*.1.*"),
    "activations are quantized": lambda: quantize_activations_(rounded(grid_of())),
    r"q_proj\.weight is on 5 bits, and the format has 2, 3, 4 and 8": lambda: rounded(grid_of(5)),
    r"gate_proj\.weight has 100 outputs, which at 4 bits must be a multiple of 8": lambda: rounded(
        grid_of(), llama(intermediate_size=100)
    ),
    r"down_proj\.weight has 100 inputs, which at 4 bits must be a multiple of 8": lambda: rounded(
        grid_of(), llama(intermediate_size=100), where="*down_proj"
    ),
    r"gate_proj\.weight has 80 outputs, which at 3 bits must be a multiple of 32": lambda: rounded(
        grid_of(3), llama(intermediate_size=80)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_form_cannot_hold_is_refused_before_anything_is_written(tmp_path, reason):
    with pytest.raises(UsageError, match=f"format='gptq' cannot hold this model, .*{reason}.*: use 'auto'"):
        save_quantized(REFUSED[reason](), tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


WRONG = [
    ({"checkpoint_format": "marlin"}, "is of checkpoint_format 'marlin'; this version of the library reads 'gptq' and"),
    ({"bits": 5}, "is of 5 bits; the format has 2, 3, 4 and 8"),
    ({"bits": 8}, r"down_proj in .* does not fit its config\.json: 64 codes of 8 bits take 64 bytes per row, got 32"),
    ({"bits": None}, "quantization_config has no bits"),
    ({"group_size": 32}, "g_idx does not count groups of 32 inputs in order"),
    ({"group_size": -1}, "g_idx does not count groups of 96 inputs in order"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_loading_names_what_does_not_fit(tmp_path, change, message):
    save_quantized(rounded(grid_of(4, 16)), tmp_path / "out", "gptq")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    facts = {key: value for key, value in (config["quantization_config"] | change).items() if value is not None}
    file.write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(UsageError, match=message):
        load_quantized(tmp_path / "out")


def test_inputs_in_another_order_and_missing_tensors_are_named(tmp_path):
    save_quantized(rounded(grid_of(4, 16)), tmp_path / "out", "gptq")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{PROJECTION}.g_idx": tensors[f"{PROJECTION}.g_idx"].flip(0)}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"{PROJECTION} in .*files made with desc_act=True cannot be read"):
        load_quantized(tmp_path / "out")
    del tensors[f"{PROJECTION}.qzeros"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"is damaged: {PROJECTION} has no qzeros"):
        load_quantized(tmp_path / "out")


def test_a_folder_takes_no_instance(tmp_path):
    save_quantized(rounded(grid_of()), tmp_path / "out", "gptq")
    with pytest.raises(UsageError, match="leave model= out"):
        load_quantized(tmp_path / "out", llama())
