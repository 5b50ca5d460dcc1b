import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.continual import align_logits, align_weights_, clip_head_, expand_head, expand_head_
from weightsmith.core.errors import UsageError, WeightsmithWarning

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))


def random_head(n, d, *, seed=0, bias=True, dtype=torch.float64, scale=None):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, n, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if scale is not None:
        head.weight.data.mul_(scale[:, None])
    return head


@settings(deadline=None)
@given(SIZES, st.sampled_from([1, 2, 3.5, math.inf]), st.integers(0, 99))
def test_mean_norms_are_equal_afterwards_and_old_rows_stay(sizes, p, seed):
    n_old, n_new, d = sizes
    head = random_head(n_old + n_new, d, seed=seed)
    before = head.weight.data.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = align_weights_(head, n_old, p=p, gamma_max=None)
        again = align_weights_(head, n_old, p=p, gamma_max=None)
    norms = head.weight.data.norm(p=p, dim=1)
    assert norms[:n_old].mean().item() == pytest.approx(norms[n_old:].mean().item(), rel=1e-12)
    assert torch.equal(head.weight.data[:n_old], before[:n_old])
    torch.testing.assert_close(head.weight.data[n_old:], before[n_old:] * done.gamma, rtol=1e-12, atol=0)
    assert again.gamma == pytest.approx(1.0, rel=1e-12)
    assert done.model is head


@settings(deadline=None)
@given(SIZES, st.integers(0, 99))
def test_folding_equals_scaling_logits(sizes, seed):
    n_old, n_new, d = sizes
    head = random_head(n_old + n_new, d, seed=seed)
    x = torch.randn(5, d, dtype=torch.float64)
    logits = head(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unchanged = align_weights_(head, n_old, fold=False)
        torch.testing.assert_close(head(x), logits, rtol=0, atol=0)
        done = align_weights_(head, n_old)
    assert done.gamma == unchanged.gamma <= 1
    torch.testing.assert_close(head(x), align_logits(logits, n_old, done.gamma))


def test_nothing_is_old_at_the_first_step():
    head = random_head(3, 4)
    before = copy.deepcopy(head.state_dict())
    assert align_weights_(head, 0).gamma == 1
    assert all(torch.equal(head.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_are_measured_in_float32(dtype):
    # 70000 is beyond the largest float16
    head = random_head(4, 256, dtype=dtype, scale=torch.tensor([300.0, 300, 600, 600], dtype=torch.float64))
    done = align_weights_(head, 2)
    assert math.isfinite(done.gamma)
    assert done.gamma == pytest.approx(0.5, rel=0.2)
    assert head.weight.dtype == dtype


def test_a_pointwise_convolution_is_a_head():
    linear = random_head(5, 6)
    conv = nn.Conv2d(6, 5, 1).double()
    conv.weight.data.copy_(linear.weight.data[..., None, None])
    conv.bias.data.copy_(linear.bias.data)
    assert align_weights_(conv, 3).gamma == align_weights_(linear, 3).gamma
    torch.testing.assert_close(conv.weight.data.flatten(1), linear.weight.data)


@pytest.mark.parametrize(
    "head", [nn.ConvTranspose2d(3, 4, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Embedding(4, 3)]
)
def test_other_heads_are_refused(head):
    with pytest.raises(TypeError, match="head must be"):
        align_weights_(head, 2)


@pytest.mark.parametrize("n_old", [-1, 4, 5, True, 1.5])
def test_a_number_of_old_classes_out_of_range_is_refused(n_old):
    with pytest.raises(UsageError, match="n_old must be"):
        align_weights_(random_head(4, 3), n_old)


def test_a_row_that_is_not_finite_is_named():
    head = random_head(4, 3)
    head.weight.data[2, 1] = math.nan
    with pytest.raises(UsageError, match="row 2"):
        align_weights_(head, 2)


def test_new_rows_of_zero_stay_with_a_warning():
    head = random_head(4, 3)
    head.weight.data[2:] = 0
    with pytest.warns(WeightsmithWarning, match="all rows of new classes are zero"):
        assert align_weights_(head, 2).gamma == 1


def test_old_rows_of_zero_are_refused():
    head = random_head(4, 3)
    head.weight.data[:2] = 0
    with pytest.raises(UsageError, match="all 2 rows of old classes are zero"):
        align_weights_(head, 2)


def test_smaller_new_rows_are_clamped_and_the_free_factor_is_told():
    head = random_head(4, 30, scale=torch.tensor([2.0, 2, 1, 1], dtype=torch.float64))
    before = head.weight.data.clone()
    done = align_weights_(head, 2)
    assert done.gamma == 1 < done.unclamped
    assert torch.equal(head.weight.data, before)


def test_a_normalized_head_gets_a_warning():
    head = random_head(4, 3)
    head.weight.data.copy_(nn.functional.normalize(head.weight.data))
    with pytest.warns(WeightsmithWarning, match="same norm"):
        align_weights_(head, 2)


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_parametrized_weight_is_refused_but_measured(normed):
    head = normed(random_head(4, 3))
    with pytest.raises(UsageError, match="is computed"):
        align_weights_(head, 2)
    assert align_weights_(head, 2, fold=False).gamma > 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_head_is_refused():
    model = Tied()
    with pytest.raises(UsageError, match=r"tied to 'embedding\.weight'"):
        align_weights_(model.head, 2, model=model)
    with pytest.raises(UsageError, match=r"tied to 'embedding\.weight'"):
        expand_head_(model, 8, "head")


def test_a_frozen_head_is_aligned():
    head = random_head(4, 3).requires_grad_(False)
    assert align_weights_(head, 2, gamma_max=None).gamma != 1
    assert not expand_head(head, 5).weight.requires_grad


@pytest.mark.parametrize("init", ["reinit", "grow"])
@pytest.mark.parametrize("bias", [None, True, False])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4).half(), lambda: nn.Conv2d(3, 4, 1).double().eval()])
def test_an_expanded_head_is_like_the_old_one(make, init, bias):
    head = make()
    made = expand_head(head, 6, init=init, bias=bias)
    assert type(made) is type(head)
    assert made.weight.shape == (6, *head.weight.shape[1:])
    assert made.weight.dtype == head.weight.dtype
    assert made.training == head.training
    assert (made.bias is not None) == (bias is not False)
    assert torch.equal(made.weight[:4], head.weight) == (init == "grow")
    assert len(head.weight) == 4


@pytest.mark.parametrize("n_classes", [3, 4.0, True])
def test_a_head_does_not_shrink(n_classes):
    with pytest.raises(UsageError, match="n_classes must be"):
        expand_head(nn.Linear(3, 4), n_classes)


def test_near_names_of_heads_are_told():
    with pytest.raises(UsageError, match=r"did you mean '0'|known: '0'"):
        expand_head_(nn.Sequential(nn.Linear(3, 4)), 5, "fc")


def test_a_transformers_model_learns_its_number_of_labels():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    old = model.classifier.weight.detach().clone()
    expand_head_(model, 5, "classifier", init="grow")
    tokens = torch.tensor([[1, 2, 3]])
    output = model(tokens, labels=torch.tensor([4]))
    assert output.logits.shape == (1, 5)
    assert output.loss.isfinite()
    assert model.config.num_labels == model.num_labels == 5
    assert model.config.label2id["LABEL_4"] == 4
    assert torch.equal(model.classifier.weight[:3], old)


def test_clipping_leaves_the_bias():
    head = random_head(4, 3)
    bias = head.bias.data.clone()
    assert clip_head_(head) is head
    assert head.weight.min() >= 0
    assert torch.equal(head.bias.data, bias)
