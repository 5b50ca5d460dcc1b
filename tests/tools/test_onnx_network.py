"""ONNX files as networks: what they compute, and that they can be certified."""

import numpy as np
import pytest
import torch

from weightsmith.certify import bounds, margins
from weightsmith.cli import main
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation
from weightsmith.tools.onnx_network import read_onnx

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32) * 0.4


def write(path, nodes, weights, *, batch="batch", shape=(1, 8, 8), opset=18):
    """A file from lines such as ``("Conv", ["x", "w"], "y", {"pads": [1, 1, 1, 1]})``; the last one is the output."""
    made = [helper.make_node(kind, inputs, [gives], **more) for kind, inputs, gives, more in nodes]
    graph = helper.make_graph(
        made, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


CONVNET = (
    [
        ("Conv", ["x", "w0", "b0"], "c", {"pads": [1, 1, 1, 1]}),
        ("BatchNormalization", ["c", "scale", "shift", "mean", "var"], "n", {}),
        ("Relu", ["n"], "r", {}),
        ("Conv", ["r", "w1"], "d", {"pads": [1, 1, 1, 1], "group": 2}),
        ("Add", ["d", "r"], "a", {}),
        ("LeakyRelu", ["a"], "l", {"alpha": 0.2}),
        ("MaxPool", ["l"], "p", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", ["p"], "q", {"kernel_shape": [2, 2], "strides": [1, 1]}),
        ("Reshape", ["q", "shape"], "f", {}),
        ("Gemm", ["f", "w2", "b2"], "g", {"transB": 1}),
        ("Tanh", ["g"], "t", {}),
        ("MatMul", ["t", "w3"], "m", {}),
        ("Add", ["m", "b3"], "y", {}),
    ],
    {
        "w0": random(4, 1, 3, 3), "b0": random(4), "scale": random(4), "shift": random(4), "mean": random(4),
        "var": np.abs(random(4)) + 0.5, "w1": random(4, 2, 3, 3), "shape": np.array([0, -1]), "w2": random(6, 36),
        "b2": random(6), "w3": random(6, 10), "b3": random(10),
    },
)  # fmt: skip


def same(path, shape=(3, 1, 8, 8)):
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    network = read_onnx(path)
    torch.testing.assert_close(network(torch.tensor(x)), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    return network, torch.tensor(x)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_a_convnet_computes_what_the_file_says_and_has_bounds(tmp_path, method):
    network, x = same(write(tmp_path / "net.onnx", *CONVNET))
    found = bounds(network, x, 0.05, method=method, lower=0.0, upper=1.0)
    for seed in range(20):
        share = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).round() * 2 - 1
        values = network((x + 0.05 * share).clamp(0, 1))
        assert (values >= found.lower - 1e-5).all()
        assert (values <= found.upper + 1e-5).all()


SMALL = {"w": random(4, 64), "v": random(64, 3)}


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([("Flatten", ["x"], "f", {}), ("Gemm", ["f", "v"], "y", {})], SMALL),
        ([("GlobalAveragePool", ["x"], "g", {}), ("Squeeze", ["g", "axes"], "y", {})], {"axes": np.array([2, 3])}),
        ([("ReduceMean", ["x", "axes"], "y", {"keepdims": 0})], {"axes": np.array([2, 3])}),
        ([("ReduceSum", ["x", "axes"], "y", {})], {"axes": np.array([-1])}),
        ([("Transpose", ["x"], "t", {"perm": [0, 2, 3, 1]}), ("Flatten", ["t"], "y", {})], {}),
        ([("Mul", ["x", "c"], "m", {}), ("Sub", ["m", "x"], "s", {}), ("Concat", ["m", "s"], "y", {"axis": 1})],
         {"c": np.float32(0.5)}),
        ([("Clip", ["x", "low", "high"], "y", {})], {"low": np.float32(0.2), "high": np.float32(0.7)}),
        ([("ConvTranspose", ["x", "w"], "y", {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]})],
         {"w": random(1, 2, 3, 3)}),
        ([("Unsqueeze", ["x", "axes"], "u", {}), ("Sigmoid", ["u"], "y", {})], {"axes": np.array([1])}),
        ([("Elu", ["x"], "e", {"alpha": 0.5}), ("Softmax", ["e"], "y", {"axis": 2})], {}),
        ([("Dropout", ["x"], "d", {}), ("Identity", ["d"], "i", {}), ("Div", ["i", "c"], "y", {})],
         {"c": np.float32(3)}),
        ([("Softplus", ["x"], "s", {}), ("Neg", ["s"], "n", {}), ("Exp", ["n"], "y", {})], {}),
    ],
)  # fmt: skip
def test_operators_compute_what_the_file_says(tmp_path, nodes, weights):
    network, x = same(write(tmp_path / "net.onnx", nodes, weights))
    assert (bounds(network, x, 0.01).lower <= network(x) + 1e-5).all()


def test_a_file_for_one_example_serves_any_number(tmp_path):
    nodes = [("Reshape", ["x", "shape"], "f", {}), ("Gemm", ["f", "w"], "y", {"transB": 1})]
    path = write(tmp_path / "net.onnx", nodes, {"shape": np.array([1, 64]), "w": random(4, 64)}, batch=1)
    network = read_onnx(path)
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(network(x), x.flatten(1) @ torch.tensor(random(4, 64)).T)
    assert margins(network, x, torch.zeros(5, dtype=torch.long), 0.01).lower.shape == (5, 3)


@pytest.mark.parametrize(
    ("nodes", "weights", "said"),
    [
        ([("Floor", ["x"], "y", {})], {}, "operator Floor"),
        ([("Conv", ["x", "w"], "y", {"pads": [0, 0, 1, 1]})], {"w": random(1, 1, 3, 3)}, "Conv with other pads"),
        ([("Conv", ["x", "w"], "y", {"auto_pad": "SAME_UPPER"})], {"w": random(1, 1, 3, 3)}, "auto_pad=SAME_UPPER"),
        ([("Flatten", ["x"], "y", {"axis": 2})], {}, "Flatten with axis=2"),
        ([("ReduceMean", ["x"], "y", {})], {}, "ReduceMean over all axes"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, nodes, weights, said):
    path = write(tmp_path / "net.onnx", nodes, weights)
    with pytest.raises(UnsupportedOperation, match=said):
        read_onnx(path)


def test_a_damaged_file_and_several_inputs_are_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no such thing")
    with pytest.raises(UsageError, match="is no ONNX file"):
        read_onnx(tmp_path / "no.onnx")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "z"], ["y"])], "net",
        [value("x", TensorProto.FLOAT, [1]), value("z", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "two.onnx")
    with pytest.raises(UsageError, match="one input and one output, has 2 and 1"):
        read_onnx(tmp_path / "two.onnx")


def test_the_command_certifies_a_file(tmp_path, capsys):
    path = write(tmp_path / "net.onnx", *CONVNET)
    words = ["certify", str(path), "--data", "digits", "--eps", "0.01", "--examples", "20", "--method", "crown"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "verified (crown)" in capsys.readouterr().out


def test_the_command_says_what_it_cannot_read_and_what_may(tmp_path, capsys):
    path = write(tmp_path / "net.onnx", [("Floor", ["x"], "y", {})], {})
    with pytest.raises(SystemExit) as ended:
        main(["certify", str(path), "--data", "digits", "--eps", "0.01"])
    text = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "the operator Floor, which is not read here" in text
    assert "onnx2torch" in text
    assert "module:function" in text
