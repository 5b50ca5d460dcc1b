import copy
import re

import pytest
import torch
from safetensors.torch import load_file

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.quantize.in_training.lsq import ActivationQuantizer, LSQWeight, lsq, lsq_start

GOLDEN = load_file("tests/golden/ofq.safetensors")
CASES = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("lsq/")})
AXES = {
    "token3d": -2,
    "token4d": -2,
    "channel3d": -1,
    "channel4d": -1,
    "head4d": 1,
    "tensor": None,
    "weight": 0,
    "image": 1,
}


def calibrated(quantizer, x):
    quantizer.calibrating = True
    quantizer(x)
    quantizer.calibrating = False
    return quantizer


@pytest.mark.parametrize("case", CASES)
def test_start_values_and_gradients_are_those_of_the_authors_code(case):
    golden = {key: GOLDEN[f"lsq/{case}/{key}"] for key in ("x", "s", "s_init", "g", "out", "grad_x", "grad_s")}
    options = {"signed": "unsigned" not in case, "axis": AXES[case.split("_")[0]]}
    bits = int(re.search(r"b(\d)", case)[1])
    x, s = golden["x"].requires_grad_(), golden["s"].requires_grad_()
    out = lsq(x, s, bits, **options)
    out.backward(golden["g"])
    for found, name in (
        (lsq_start(x, bits, **options), "s_init"),
        (out, "out"),
        (x.grad, "grad_x"),
        (s.grad, "grad_s"),
    ):
        assert torch.allclose(found, golden[name], rtol=0, atol=1e-9), name


def test_a_scale_below_the_floor_counts_as_the_floor_and_can_grow_again():
    x = torch.tensor([3e-5, -1e-3], requires_grad=True)
    for value in (-1.0, 0.0, 1e-9):
        s = torch.tensor([value], requires_grad=True)
        out = lsq(x, s, 4)
        assert torch.allclose(out, torch.tensor([3e-5, -8e-5]))
        out.sum().backward()
        assert s.grad.isfinite().all()
        assert s.grad.abs() > 0


def test_the_bounds_pass_gradients_and_what_is_beyond_does_not():
    x = torch.tensor([-2.0, -2.01, 1.0, 1.01], requires_grad=True)
    lsq(x, torch.ones(1), 2).sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 0]


def test_a_scale_of_the_wrong_length_is_refused():
    with pytest.raises(UsageError, match="must have 5 entries"):
        lsq(torch.ones(2, 5, 3), torch.ones(1), 2, axis=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(2, 5, 8).to(dtype)
    scale = lsq_start(x, 4, axis=-2)
    assert scale.dtype == torch.float32
    assert torch.equal(lsq(x, scale, 4, axis=-2), lsq(x.float(), scale, 4, axis=-2).to(dtype))


def test_it_compiles_into_one_graph():
    torch._dynamo.reset()
    x, s = torch.randn(2, 5, 8, requires_grad=True), torch.full((5,), 0.3, requires_grad=True)
    before, after = torch.full((8,), 0.1, requires_grad=True), torch.full((8,), 0.2, requires_grad=True)
    inputs = (x, s, before, after)

    def call(x, s, before, after):
        return lsq(x, s, 2, axis=-2, before=before, after=after)

    out = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    assert torch.equal(out, call(*inputs))
    assert all(torch.allclose(left, right) for left, right in zip(grads, expected, strict=True))


def test_a_weight_starts_from_its_own_size_and_gives_grid_values():
    w = torch.randn(4, 20)
    quantizer = LSQWeight(w, 3)
    codes = quantizer.codes(w)
    assert torch.allclose(quantizer.scale, 2 * w.abs().mean(1) / 3**0.5)
    assert torch.equal(quantizer(w), codes * quantizer.step(w))
    assert codes.min() >= -4
    assert codes.max() <= 3


def test_another_length_names_both_and_shows_the_way_out():
    quantizer = calibrated(ActivationQuantizer(2), torch.randn(3, 5, 8))
    quantizer.name = "the input of fc1"
    with pytest.raises(
        UsageError, match=r'fc1 was calibrated for a length of 5 and got one of 1.*granularity="tensor"'
    ):
        quantizer(torch.randn(3, 1, 8))
    single = calibrated(ActivationQuantizer(2), torch.randn(1, 1, 8))
    with pytest.raises(UsageError, match="length of 1 and got one of 5"):
        single(torch.randn(1, 5, 8))


def test_two_dimensional_inputs_share_one_scale():
    quantizer = calibrated(ActivationQuantizer(2), torch.randn(3, 8))
    assert quantizer.scale.shape == (1,)
    assert quantizer(torch.randn(7, 8)).shape == (7, 8)


def test_training_without_calibration_works_and_warns():
    quantizer = ActivationQuantizer(2)
    owner = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    with pytest.warns(WeightsmithWarning, match="call calibrate_"):
        quantizer(torch.randn(2, 5, 8)).square().sum().backward()
    before = quantizer.scale.detach().clone()
    owner.step()
    assert not torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibration_batch_that_is_not_finite_is_refused(value):
    quantizer = ActivationQuantizer(2)
    quantizer.name = "the input of head"
    with pytest.raises(UsageError, match="NaN or infinite values to the input of head"):
        quantizer(torch.full((2, 3, 4), value))


def test_a_token_of_zeros_gets_the_smallest_scale():
    x = torch.randn(2, 3, 4)
    x[:, 1] = 0
    quantizer = calibrated(ActivationQuantizer(2), x)
    assert quantizer.scale[1].item() == pytest.approx(1e-5)
    assert quantizer(x).isfinite().all()


def test_the_sign_follows_the_first_batch_when_it_is_open():
    positive, mixed = torch.rand(2, 3, 4), torch.randn(2, 3, 4)
    assert calibrated(ActivationQuantizer(2, signed=None), positive).signed is False
    assert calibrated(ActivationQuantizer(2, signed=None), mixed).signed is True
    again = calibrated(ActivationQuantizer(2, signed=None), positive)
    again.reset()
    assert calibrated(again, mixed).signed is True


def test_checkpoints_and_copies_carry_scale_and_sign():
    x = torch.rand(2, 3, 4)
    quantizer = calibrated(ActivationQuantizer(2, signed=None, shifts=(4,)), x)
    fresh = ActivationQuantizer(2, signed=None, shifts=(4,))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    empty = ActivationQuantizer(2, signed=None, shifts=(4,))
    quantizer.load_state_dict(empty.state_dict())
    assert not quantizer.calibrated


def test_shifts_per_pixel_take_the_size_of_the_first_images():
    x = torch.rand(2, 3, 6, 5)
    quantizer = calibrated(ActivationQuantizer(8, -3, signed=None, shifts=()), x)
    assert quantizer.before.shape == quantizer.after.shape == (6, 5)
    assert quantizer.scale.shape == (3,)
    fresh = ActivationQuantizer(8, -3, signed=None, shifts=())
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
