"""Against the authors' own functions and PyCIL's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.continual import align_logits, align_weights_, distillation_loss, herding, incremental_loss
from weightsmith.continual.aligning import alignment_factor
from weightsmith.continual.head import clip_head_

GOLDEN = load_file(Path(__file__).parents[1] / "golden/weight-aligning.safetensors")
CASES = ("a", "b", "shrunk", "bias")


def case(name, dtype=torch.float64):
    held = {key.partition(".")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}.")}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in held.items()}


def head_of(golden):
    head = nn.Linear(*reversed(golden["fc_weight"].shape), bias="fc_bias" in golden, dtype=golden["fc_weight"].dtype)
    head.weight.data.copy_(golden["fc_weight"])
    if "fc_bias" in golden:
        head.bias.data.copy_(golden["fc_bias"])
    return head


def near(found, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_official_factor_and_logits(name, dtype):
    golden = case(name, dtype)
    n_old, p = golden["n_old"].item(), golden["p"].item()
    head = head_of(golden)
    logits = head(golden["x"])
    near(logits, golden["logits"], dtype)
    done = align_weights_(head, n_old, p=p)
    near(torch.tensor([done.gamma], dtype=dtype), golden["gamma_official"], dtype)
    near(head(golden["x"]), golden["logits_aligned_official"], dtype)
    near(align_logits(logits, n_old, done.gamma), golden["logits_aligned_official"], dtype)
    accuracy = [(o.argmax(1) == golden["labels"]).double().mean() for o in (logits, head(golden["x"]))]
    torch.testing.assert_close(torch.stack(accuracy), golden["acc_before_after_top1"].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_pycil_scales_the_weight_alone_without_a_clamp(name):
    golden = case(name)
    head = head_of(golden)
    bias = None if head.bias is None else head.bias.clone()
    align_weights_(head, golden["n_old"].item(), p=2, gamma_max=None, scale_bias=False)
    near(head.weight.data, golden["fc_weight_aligned_pycil_l2"], torch.float64)
    assert bias is None or torch.equal(head.bias, bias)


@pytest.mark.parametrize("name", CASES)
def test_a_distillation_step(name):
    golden = case(name)
    old = golden["kd_old_weight"]
    n, n_old = len(golden["fc_weight"]), len(old)
    size = n_old // len(golden["kd_old_alphas"])
    teacher = golden["x"] @ old.T
    aligned = teacher * golden["kd_old_alphas"].repeat_interleave(size)
    weight = golden["kd_new_weight_before"].clone().requires_grad_()
    logits = golden["x"] @ weight.T
    loss = incremental_loss(logits, golden["labels"], aligned, n_old, share=golden["lambda"].item())
    near(loss.reshape(1), golden["kd_loss_total"], torch.float64)
    near(golden["lambda"], torch.tensor([n_old / n], dtype=torch.float64), torch.float64)
    loss.backward()
    near(weight.grad, golden["kd_grad_new_weight"], torch.float64)
    head = nn.Linear(weight.shape[1], n, bias=False, dtype=torch.float64)
    head.weight.data.copy_(weight.detach() - 0.5 * weight.grad)
    near(clip_head_(head).weight.data, golden["kd_new_weight_after_sgd_lr0.5_and_clip"], torch.float64)
    near(nn.functional.cross_entropy(logits, golden["labels"]).reshape(1), golden["ce_term"], torch.float64)
    plain = distillation_loss(logits, teacher, n_old)
    near(plain.reshape(1), golden["kd_term_pycil_T2_unaligned_teacher"], torch.float64)


def test_herding_order():
    golden = case("herd")
    m = golden["m"].item()
    for label, expected in enumerate(golden["icarl_pycil_by_class"]):
        members = (golden["labels"] == label).nonzero().flatten()
        assert torch.equal(members[herding(golden["features"][members], m)], expected)


def test_factor_is_the_ratio_of_the_mean_norms():
    golden = case("a")
    old, new = alignment_factor(golden["fc_weight"], golden["n_old"].item(), p=golden["p"].item())
    near(torch.tensor([min(1.0, old / new)], dtype=torch.float64), golden["gamma_official"], torch.float64)
