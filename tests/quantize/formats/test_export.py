import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize.after_training.activations import quantize_activations_
from weightsmith.quantize.after_training.verbs import round_to_nearest_
from weightsmith.quantize.formats import export, native
from weightsmith.quantize.formats.export import export_onnx, load_quantized, save_quantized
from weightsmith.quantize.grid import Grid, QuantizedWeight, quantized_weights, write_quantized_

GRIDS = [
    Grid(bits, symmetric=symmetric, granularity=granularity, search="minmax")
    for bits, symmetric, granularity in [
        (2, False, "channel"),
        (3, True, "channel"),
        (4, False, 8),
        (4, False, "tensor"),
        (5, True, "tensor"),
        (8, False, "channel"),
    ]
]


def _name(grid):
    return f"{grid.bits}-{'symmetric' if grid.symmetric else 'asymmetric'}-{grid.granularity}"


def tiny_llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **changes)).to(dtype).eval()


class Net(nn.Module):
    """A convolutional network with every kind of weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.depthwise(self.norm(self.first(x)).relu()).relu()
        return self.head(self.up(x).relu().mean((2, 3)))


def half_integer(layer, bits):
    """Put a layer on the half-integer grid of its own row means, as StatsQ does (arXiv 2302.02210, section 3)."""
    half = 2 ** (bits - 1)
    weight = layer.weight.detach()
    step = 2 * weight.abs().flatten(1).mean(1, keepdim=True) / half
    codes = (weight / step.view(-1, *(1,) * (weight.ndim - 1)) - 0.5).round().clamp(-half, half - 1).to(torch.int8)
    zero = torch.zeros_like(step, dtype=torch.int8)
    write_quantized_(layer, QuantizedWeight(codes, step, zero, bits, True, "channel", 0, 0.5))


def assert_same_codes(left, right):
    assert list(left) == list(right)
    for name, one in left.items():
        other = right[name]
        assert one.codes.dtype == other.codes.dtype
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.zero_point, other.zero_point)
        facts = ("bits", "symmetric", "granularity", "axis", "offset")
        assert [getattr(one, fact) for fact in facts] == [getattr(other, fact) for fact in facts]


def assert_same_model(left, right):
    assert_same_codes(quantized_weights(left), quantized_weights(right))
    right_state = right.state_dict()
    assert left.state_dict().keys() == right_state.keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right_state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=_name)
@pytest.mark.parametrize("format", ["compressed-tensors", "weightsmith"])
def test_a_language_model_comes_back_bit_for_bit(tmp_path, format, grid, dtype):
    model = tiny_llama(dtype)
    round_to_nearest_(model, None, grid)
    save_quantized(model, tmp_path / "out", format)
    loaded = load_quantized(tmp_path / "out")
    assert_same_model(model, loaded)
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("grid", GRIDS[:3], ids=_name)
def test_transformers_alone_loads_the_very_weights(tmp_path, grid):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(torch.bfloat16)
    round_to_nearest_(model, None, grid)
    assert "dequantize" in (save_quantized(model, tmp_path / "out") / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_a_fresh_process_without_this_package_generates_the_same_tokens(tmp_path):
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    save_quantized(model, tmp_path / "out")
    prompt = torch.arange(6)[None]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False).tolist()
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
tokens = model.generate(torch.arange(6)[None], max_new_tokens=5, do_sample=False).tolist()
assert tokens == {expected}, tokens
assert not any(name.startswith("weightsmith") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_auto_falls_back_to_the_own_layout_for_what_the_format_cannot_hold(tmp_path):
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    half_integer(model.model.layers[0].mlp.up_proj, 3)
    save_quantized(model, tmp_path / "out")
    assert (tmp_path / "out" / native.CONFIG).is_file()
    assert_same_model(model, load_quantized(tmp_path / "out"))
    with pytest.raises(UsageError, match="half integers"):
        save_quantized(model, tmp_path / "other", "compressed-tensors")
    assert not (tmp_path / "other").exists()


def test_gpt2_whose_weights_are_transposed_goes_into_the_own_layout(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    round_to_nearest_(model, None, Grid(3, granularity=8, search="minmax"))
    save_quantized(model, tmp_path / "out")
    assert (tmp_path / "out" / native.CONFIG).is_file()
    assert_same_model(model, load_quantized(tmp_path / "out"))


def test_transformers_refuses_the_own_layout_instead_of_drawing_fresh_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    round_to_nearest_(model, None, GRIDS[0])
    save_quantized(model, tmp_path / "out", "weightsmith")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_plain_network_comes_back_bit_for_bit(tmp_path, bits, granularity, symmetric):
    torch.manual_seed(0)
    model = Net().eval()
    round_to_nearest_(model, None, Grid(bits, granularity=granularity, symmetric=symmetric, search="minmax"))
    save_quantized(model, tmp_path / "out")
    assert_same_model(model, load_quantized(tmp_path / "out", Net().eval()))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_half_integer_grids_come_back_bit_for_bit(tmp_path, bits):
    model = Net().eval()
    for layer in (model.first, model.head):
        half_integer(layer, bits)
    save_quantized(model, tmp_path / "out")
    assert_same_model(model, load_quantized(tmp_path / "out", Net().eval()))


def test_quantized_activations_are_saved_with_the_weights(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    quantize_activations_(model, x, mode="static", where="first")
    quantize_activations_(model, mode="dynamic", where="head")
    save_quantized(model, tmp_path / "out")
    assert torch.equal(load_quantized(tmp_path / "out", Net().eval())(x), model(x))


def test_a_transformers_model_with_quantized_activations_goes_into_the_own_layout(tmp_path):
    tokens = torch.arange(12).view(2, 6)
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    quantize_activations_(model, tokens, mode="static")
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_packed_files_are_as_small_as_their_bits(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    round_to_nearest_(model, None, Grid(2, search="minmax"))
    save_quantized(model, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert size < 512 * 512 * 2 / 8 + 512 * 5 + 1000


@pytest.mark.parametrize("format", ["compressed-tensors", "weightsmith"])
def test_a_full_disk_leaves_the_old_folder_as_it_was(tmp_path, format, monkeypatch):
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    monkeypatch.setattr("weightsmith.core.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_quantized(model, tmp_path / "out", format)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_saving_needs_quantized_weights(tmp_path):
    with pytest.raises(UsageError, match="no quantized weights"):
        save_quantized(Net(), tmp_path / "out")


def test_saving_refuses_an_unknown_format(tmp_path):
    with pytest.raises(UsageError, match="format 'ggml' is not known"):
        save_quantized(Net(), tmp_path / "out", "ggml")


def test_compressed_tensors_refuses_convolutions_and_models_that_are_not_from_transformers(tmp_path):
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    with pytest.raises(UsageError, match="not a transformers model"):
        save_quantized(model, tmp_path / "out", "compressed-tensors")


def trained(model, size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=size)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()


def merged(model, size):
    with torch.no_grad():
        model.head.weight += size * torch.randn(5, 1).sign() @ torch.randn(1, 6).sign()


def averaged(model, size):
    with torch.no_grad():
        model.head.weight.lerp_(torch.zeros(5, 6), 10 * size)


@pytest.mark.parametrize("change", [trained, merged, averaged])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=str)
def test_a_weight_that_was_trained_after_quantizing_is_not_saved(tmp_path, change, dtype, size):
    torch.manual_seed(0)
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    change(model, size)
    codes = vars(model.head)["_quantized_tensors"]["weight"]
    rounded = (model.head.weight / codes.scale).round() + codes.zero_point
    assert torch.equal(rounded.detach(), codes.codes.float())  # the same codes, although the function has changed
    model.to(dtype)
    with pytest.raises(UsageError, match=r"has been changed since it was quantized.*quantize it again"):
        save_quantized(model, tmp_path / "out")
    with pytest.raises(UsageError, match="has been changed"):
        export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_narrower_dtype_keeps_the_codes(tmp_path):
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    save_quantized(model.half(), tmp_path / "out")
    assert_same_model(model, load_quantized(tmp_path / "out", Net().half().eval()))


def test_a_weight_that_gave_way_to_a_parametrization_is_not_saved(tmp_path):
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(UsageError, match=r"head\.weight was quantized and is no longer a plain parameter"):
        save_quantized(model, tmp_path / "out")


def test_loading_names_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UsageError, match="holds no quantized model"):
        load_quantized(tmp_path)
    (tmp_path / native.CONFIG).write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        load_quantized(tmp_path)
    (tmp_path / native.CONFIG).write_text(json.dumps({"quant_method": "weightsmith", "version": 99}))
    with pytest.raises(UsageError, match="version 99"):
        load_quantized(tmp_path)


def test_loading_a_plain_network_asks_for_an_instance_that_fits(tmp_path):
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    save_quantized(model, tmp_path / "out")
    with pytest.raises(UsageError, match="pass model="):
        load_quantized(tmp_path / "out")
    with pytest.raises(UsageError, match="does not fit"):
        load_quantized(tmp_path / "out", nn.Linear(2, 2))


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay in float32
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def onnx_weights(path, weights):
    """What the runtime makes of every stored weight."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    proto = onnx.load(path)
    names = set(weights)
    nodes = [node for node in proto.graph.node if set(node.output) & {*names, *(f"{name}.float" for name in names)}]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    held = [tensor for tensor in proto.graph.initializer if tensor.name.rsplit(".", 1)[0] in names]
    graph = onnx.helper.make_graph(nodes, "weights", [], outputs, held)
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {}), strict=True))


def assert_onnx_keeps(model, example, path):
    export_onnx(model, example, path)
    weights = quantized_weights(model)
    for name, value in onnx_weights(path, weights).items():
        assert torch.equal(torch.from_numpy(value), weights[name].dequantize()), name
    for x in (example, example[:1], torch.cat([example, example.flip(0), example])):  # the batch is free
        with torch.no_grad():
            assert torch.allclose(run_onnx(path, x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    "grid",
    [Grid(b, symmetric=s, search="minmax") for b, s in ((3, True), (4, False), (8, True), (8, False))],
    ids=_name,
)
def test_onnx_computes_with_the_very_weights(tmp_path, grid):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Net().eval()
    round_to_nearest_(model, None, grid)
    assert_onnx_keeps(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")


@pytest.mark.parametrize("granularity", ["tensor", 16])
def test_onnx_holds_one_scale_and_many(tmp_path, granularity):
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    round_to_nearest_(model, None, Grid(4, granularity=granularity, search="minmax"))
    assert_onnx_keeps(model, torch.randn(3, 32), tmp_path / "net.onnx")


@pytest.mark.parametrize(("bits", "stored"), [(3, "INT4"), (4, "INT8"), (8, "INT16")])
def test_onnx_holds_half_integer_grids_as_odd_integers(tmp_path, bits, stored):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)).eval()
    for layer in (model[0], model[2]):
        half_integer(layer, bits)
    assert_onnx_keeps(model, torch.randn(3, 8), tmp_path / "net.onnx")
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert kinds["0.weight.codes"] == getattr(onnx.TensorProto, stored)


def test_onnx_export_of_a_vision_transformer(tmp_path):
    pytest.importorskip("onnxscript")
    from weightsmith.lab.models import build_model

    model = build_model("vit_tiny", channels=1, size=8, classes=4).eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    assert_onnx_keeps(model, torch.randn(2, 1, 8, 8), tmp_path / "vit.onnx")


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)], ids=["int8", "uint8", "int4", "uint4"]
)
def test_onnx_files_are_as_small_as_their_integers(tmp_path, bits, symmetric):
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)).eval()
    round_to_nearest_(model, None, Grid(bits, symmetric=symmetric, search="minmax"))
    path = export_onnx(model, torch.randn(2, 512), tmp_path / "net.onnx")
    scales = 2 * 512 * 5
    assert path.stat().st_size < 2 * 512 * 512 * bits / 8 + scales + 10_000  # 10 kB for the graph


def test_onnx_export_can_fix_the_batch_and_says_when_it_must(tmp_path):
    pytest.importorskip("onnxscript")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x).reshape(2, 4)

    model = Two().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    with pytest.raises(UsageError, match="pass free_batch=False"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "net.onnx")
    x = torch.randn(2, 4)
    export_onnx(model.train(), x, tmp_path / "net.onnx", free_batch=False)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.allclose(run_onnx(tmp_path / "net.onnx", x), model(x), atol=1e-5)


def test_onnx_export_takes_several_inputs_and_an_example_of_one_sample(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, *parts):
            return self.fc(parts[0] + parts[1])

    model = Sum().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    export_onnx(model, (torch.randn(1, 4), torch.randn(1, 4)), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    sizes = {value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output]}
    assert sizes == {"batch"}
    with pytest.raises(UsageError, match="as many samples in each input"):
        export_onnx(model, (torch.randn(1, 4), torch.randn(2, 4)), tmp_path / "net.onnx")


def test_onnx_export_needs_quantized_weights_and_leaves_an_old_file(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with pytest.raises(UsageError, match="no quantized weights"):
        export.export_onnx(Net(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    model = nn.Sequential(nn.Linear(2, 2))
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    (tmp_path / "net.onnx").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        export_onnx(model, torch.randn(1, 2), tmp_path / "net.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "old")]


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))


def with_bone(model):
    from weightsmith.adapt import BoneConfig, apply_bone_

    return apply_bone_(model, BoneConfig(r=4, where="*q_proj"))


@pytest.mark.parametrize("format", ["auto", "weightsmith", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("put_on", [with_lora, with_bone])
def test_an_adapter_is_not_lost_by_saving(tmp_path, put_on, format):
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, granularity=8, search="minmax"))
    adapted = put_on(model)
    for holder in {adapted, model}:  # PEFT also changes the model inside
        with pytest.raises(UsageError, match="q_proj carries an adapter"):
            save_quantized(holder, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_a_model_without_its_adapter_is_saved_again(tmp_path):
    from weightsmith.adapt import unload_bone_

    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    plain = copy.deepcopy(model)
    save_quantized(with_lora(model).unload(), tmp_path / "lora")
    assert_same_model(plain, load_quantized(tmp_path / "lora"))
    save_quantized(unload_bone_(with_bone(copy.deepcopy(plain))), tmp_path / "bone")
    assert_same_model(plain, load_quantized(tmp_path / "bone"))


def test_wrappers_are_taken_off_before_saving(tmp_path):
    model = Net().eval()
    round_to_nearest_(model, None, Grid(4, search="minmax"))
    for wrapped, advice in (
        (torch.compile(model), r"pass model\._orig_mod"),
        (nn.DataParallel(model), r"model\.module"),
    ):
        with pytest.raises(UsageError, match=advice):
            save_quantized(wrapped, tmp_path / "out")


def test_a_transformers_model_with_a_parametrization_is_folded_before_saving(tmp_path):
    model = tiny_llama()
    round_to_nearest_(model, None, Grid(4, search="minmax"), where="*mlp*")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(UsageError, match=r"q_proj has a parametrization.*fold_"):
        save_quantized(model, tmp_path / "out")


def test_a_compander_folded_then_rounded_runs_in_onnxruntime_at_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    from weightsmith import fold_
    from weightsmith.quantize import flexround_
    from weightsmith.reparam import compand_

    torch.manual_seed(0)
    model = fold_(compand_(Net())).eval()
    flexround_(model, torch.randn(32, 3, 8, 8), Grid(4, search="minmax"), blocks="layers", iterations=5)
    assert_onnx_keeps(model, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")


def test_packed_projections_are_exported(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    round_to_nearest_(model, None, Grid(8, search="minmax"))
    assert_onnx_keeps(model, torch.randn(2, 5, 16), tmp_path / "net.onnx")


def test_steps_of_activations_come_back_in_the_precision_of_the_model(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(40, 8, dtype=torch.float64)
    round_to_nearest_(model)
    quantize_activations_(model, x, mode="static")
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", nn.Sequential(nn.Linear(8, 8)).double())
    assert torch.equal(loaded[0].input_quantizer.scale, model[0].input_quantizer.scale)
