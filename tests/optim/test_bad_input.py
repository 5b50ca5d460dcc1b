"""Situations that break other implementations."""

import math

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.optim import SGDP, AdamP, param_groups

BOTH = pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
FORMS = pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}], ids=str)


def step(optimizer_class, w, *grads, lr=0.1, weight_decay=0.1, **options):
    p = nn.Parameter(w)
    optimizer = optimizer_class([p], lr=lr, weight_decay=weight_decay, **options)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p.detach(), optimizer


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal_to(w):
    g, rows = randn(*w.shape, seed=1).flatten(1), w.flatten(1)
    return (g - (g * rows).sum(1, True) / rows.square().sum(1, True) * rows).view_as(w)


def viewed(optimizer):
    stats = optimizer.projection_stats()[0]
    return next((name for name in ("channel", "layer", "none") if getattr(stats, name)), None)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: torch.stack((t, t), dim=-1)[..., 0],
}


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@BOTH
def test_memory_layout_does_not_change_the_result(optimizer_class, layout, options):
    w = randn(4, 3, 2, 2)
    for g in (randn(4, 3, 2, 2, seed=1), orthogonal_to(w)):
        want, plain = step(optimizer_class, w.clone(), g, g, **options)
        got, laid = step(optimizer_class, LAYOUTS[layout](w), LAYOUTS[layout](g), g, **options)
        assert viewed(laid) == viewed(plain)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@FORMS
@BOTH
def test_a_zero_gradient_counts_as_orthogonal(optimizer_class, options):
    w = randn(4, 5)
    got, optimizer = step(optimizer_class, w.clone(), torch.zeros(4, 5), **options)
    assert viewed(optimizer) == "channel"
    torch.testing.assert_close(got, w * (1 - 0.1 * 0.1 * 0.1))


@FORMS
@BOTH
def test_zero_weights_and_zero_rows_give_no_nan_and_do_not_block_the_other_rows(optimizer_class, options):
    w = randn(4, 5)
    w[1] = 0
    g = torch.nan_to_num(orthogonal_to(w)) + 0 * w
    g[1] = 1.0
    got, optimizer = step(optimizer_class, w, g, **options)
    assert viewed(optimizer) == "channel"
    assert got.isfinite().all()
    got, optimizer = step(optimizer_class, torch.zeros(4, 5), randn(4, 5), **options)
    assert viewed(optimizer) == "channel"
    assert got.isfinite().all()


@FORMS
@BOTH
def test_a_gradient_shorter_than_eps_counts_as_orthogonal(optimizer_class, options):
    w = randn(4, 5)
    _, optimizer = step(optimizer_class, w.clone(), 1e-12 * w, **options)
    assert viewed(optimizer) == "channel"


@FORMS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@BOTH
def test_a_gradient_that_is_not_finite_is_not_projected_and_spreads_only_where_it_is(optimizer_class, bad, options):
    g = randn(4, 5)
    g[2, 3] = bad
    got, optimizer = step(optimizer_class, randn(4, 5, seed=1), g, **options)
    assert viewed(optimizer) == "none"
    assert (~got.isfinite()).sum() == 1


@BOTH
def test_one_row_is_channel_and_one_column_never_fires(optimizer_class):
    w = randn(1, 7)
    assert viewed(step(optimizer_class, w.clone(), orthogonal_to(w))[1]) == "channel"
    assert viewed(step(optimizer_class, randn(7, 1), randn(7, 1, seed=1))[1]) == "none"


@BOTH
def test_a_transposed_convolution_before_normalization_is_caught_by_the_layer_view(optimizer_class):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, bias=False), nn.GroupNorm(1, 4, eps=0.0)).double()
    optimizer = optimizer_class(model.parameters())
    out = model(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    optimizer.step()
    assert viewed(optimizer) == "layer"


def test_without_normalization_about_eight_percent_of_steps_project_by_chance():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(16, 16)) for _ in range(1000)]
    optimizer = AdamP(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert 50 < optimizer.projection_stats()[0].layer < 115  # erf(0.1 / sqrt 2) = 8.0 %


@BOTH
def test_rows_of_tokens_that_did_not_occur_do_not_decide(optimizer_class):
    table = nn.Embedding(10, 6)
    optimizer = optimizer_class(table.parameters())
    unit = nn.functional.normalize(table(torch.tensor([2, 5])), dim=1)
    (unit * randn(2, 6)).sum().backward()
    optimizer.step()
    assert viewed(optimizer) == "channel"


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_half_precision_weights_are_judged_in_single_precision(optimizer_class, dtype, options):
    w = randn(8, 4608).to(dtype)
    g = orthogonal_to(w.float()).to(dtype)
    got, optimizer = step(optimizer_class, w.clone(), g, **options)
    assert viewed(optimizer) == "channel"
    assert got.dtype == dtype
    assert all(
        value.dtype == dtype
        for key, value in optimizer.state[optimizer.param_groups[0]["params"][0]].items()
        if key != "step"
    )


@FORMS
@BOTH
def test_complex_weights_equal_their_real_view(optimizer_class, options):
    w, g = randn(4, 6, dtype=torch.complex64), randn(4, 6, seed=1, dtype=torch.complex64)
    for grad in (g, torch.zeros_like(g)):
        got, optimizer = step(optimizer_class, w.clone(), grad, **options)
        want, real = step(optimizer_class, torch.view_as_real(w).clone(), torch.view_as_real(grad), **options)
        assert viewed(optimizer) == viewed(real)
        torch.testing.assert_close(torch.view_as_real(got), want)


@FORMS
@BOTH
def test_a_gradient_that_autograd_leaves_conjugated_is_taken(optimizer_class, options):
    w, g = randn(4, 6, dtype=torch.complex64), randn(4, 6, seed=1, dtype=torch.complex64)
    assert g.conj().is_conj()
    got, _ = step(optimizer_class, w.clone(), g.conj(), **options)
    want, _ = step(optimizer_class, w.clone(), g.conj().resolve_conj(), **options)
    torch.testing.assert_close(got, want)


@FORMS
def test_without_eps_a_zero_gradient_is_not_projected_and_raises_nothing(options):
    w = randn(4, 3)
    got, optimizer = step(SGDP, w.clone(), torch.zeros(4, 3), eps=0.0, weight_decay=0.0, **options)
    assert viewed(optimizer) == "none"
    assert torch.equal(got, w)


@pytest.mark.filterwarnings("ignore::weightsmith.core.errors.WeightsmithWarning")
@BOTH
def test_a_complex_vector_is_a_vector(optimizer_class):
    _, optimizer = step(optimizer_class, randn(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.complex64))
    assert viewed(optimizer) is None


@BOTH
def test_a_sparse_gradient_names_the_optimizer_that_takes_it(optimizer_class):
    table = nn.Embedding(10, 6, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam"):
        optimizer_class(table.parameters()).step()


@FORMS
@BOTH
def test_empty_tensors_and_parameters_without_gradient_are_skipped(optimizer_class, options):
    empty, idle, frozen = nn.Parameter(torch.empty(0, 3)), nn.Parameter(randn(2, 3)), nn.Parameter(randn(2, 3), False)
    empty.grad = torch.empty(0, 3)
    optimizer = optimizer_class([empty, idle, frozen], **options)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.projection_stats()[0].none == 0


@BOTH
def test_a_tied_weight_is_updated_once(optimizer_class):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = optimizer_class(model.parameters())
    model(randn(2, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1


@BOTH
def test_a_parameter_that_changes_dtype_and_values_between_steps_goes_on(optimizer_class):
    p = nn.Parameter(randn(4, 5))
    optimizer = optimizer_class([p], lr=0.1)
    for dtype in (torch.float32, torch.float64):
        p.data = randn(4, 5, seed=2).to(dtype)
        p.grad = None
        p.grad = randn(4, 5, seed=3).to(dtype)
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value if key == "step" else value.to(dtype)
        optimizer.step()
    assert p.dtype == torch.float64
    assert p.isfinite().all()


@pytest.mark.parametrize(
    ("optimizer_class", "name", "value"),
    [
        *((c, n, -1.0) for c in (AdamP, SGDP) for n in ("lr", "eps", "weight_decay", "delta", "wd_ratio")),
        *((c, n, math.nan) for c in (AdamP, SGDP) for n in ("lr", "wd_ratio")),
        (AdamP, "wd_ratio", 1.5),
        (AdamP, "betas", (0.9, 1.0)),
        (AdamP, "betas", (-0.1, 0.9)),
        (AdamP, "betas", (0.9,)),
        (AdamP, "betas", 0.9),
        (SGDP, "momentum", 1.0),
        (SGDP, "momentum", -0.1),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(optimizer_class, name, value):
    p = nn.Parameter(randn(2, 2))
    with pytest.raises(UsageError, match=f"{name} must"):
        optimizer_class([p], **{name: value})
    optimizer = optimizer_class([p])
    with pytest.raises(UsageError, match=f"{name} must"):
        optimizer.add_param_group({"params": [nn.Parameter(randn(2, 2))], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["amsgrad", "fused", "differentiable"])
@BOTH
def test_options_that_are_not_offered_are_not_swallowed(optimizer_class, name):
    with pytest.raises(TypeError, match=name):
        optimizer_class([nn.Parameter(randn(2, 2))], **{name: True})


@BOTH
def test_only_vectors_warns_that_nothing_will_be_projected(optimizer_class):
    with pytest.warns(WeightsmithWarning, match="FSDP1"):
        optimizer_class([nn.Parameter(randn(5)), nn.Parameter(torch.tensor(1.0))])


@BOTH
def test_lazy_parameters_are_taken_and_step_once_their_shape_is_known(optimizer_class):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = optimizer_class(model.parameters())
    assert math.isfinite(optimizer.projection_stats()[0].mean_norm)
    with pytest.raises(UsageError, match=r"0\.weight, 0\.bias: lazy"):
        param_groups(model, 0.1)
    model(randn(3, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


@pytest.mark.filterwarnings("error")
@BOTH
def test_only_lazy_parameters_are_no_reason_to_warn(optimizer_class):
    optimizer_class(nn.LazyLinear(4).parameters())
