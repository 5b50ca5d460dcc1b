"""Certified training in a loop of one's own: every objective proves more than it began with, and resumes exactly."""

import copy

import pytest
import torch
from torch import nn

from weightsmith.certify import (
    MTLIBP,
    SABR,
    BoundOptions,
    CertifiedTraining,
    CrownIBP,
    EpsilonSchedule,
    Recipe,
    margins,
    robust_cross_entropy,
    verified_error,
)
from weightsmith.core.errors import UsageError

OBJECTIVES = {
    "ibp": "ibp",
    "crown-ibp": "crown-ibp",
    "crown-ibp, one row per class": CrownIBP(fused=False),
    "sabr": SABR(steps=2),
    "mtl-ibp": MTLIBP(steps=2),
}


def data():
    """Four Gaussian blobs in the unit square of six pixels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 4
    centers = torch.rand(4, 6, generator=generator)
    return (centers[y] + 0.05 * torch.randn(256, 6, generator=generator)).clamp(0, 1), y


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def start(objective="ibp", **more):
    x, _ = data()
    model = net()
    recipe = Recipe(objective=objective, **more)
    training = CertifiedTraining(
        model, 0.05, EpsilonSchedule(0.05, 4, length=6), x, recipe=recipe, lower=0.0, upper=1.0
    )
    return model.train(), training, torch.optim.Adam(model.parameters(), lr=5e-3)


def run(model, training, optimizer, steps, first=0):
    x, y = data()
    losses = []
    for step in range(first, first + steps):
        rows = slice(64 * (step % 4), 64 * (step % 4 + 1))
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = training.loss(x[rows], y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        training.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_proves_robustness(objective):
    model, training, optimizer = start(OBJECTIVES[objective])
    x, y = data()
    before = verified_error(model, [(x, y)], 0.05, lower=0.0, upper=1.0, attack_steps=0)
    run(model, training, optimizer, 80)
    after = verified_error(model, [(x, y)], 0.05, lower=0.0, upper=1.0, attack_steps=10)
    assert after < 0.3 < before
    assert after.standard <= after.attacked <= after
    assert training.last.regularization is None


@pytest.mark.parametrize("objective", ["ibp", "sabr"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(objective):
    model, training, optimizer = start(OBJECTIVES[objective], kappa_start=1.0, kappa_end=0.3)
    run(model, training, optimizer, 10)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    expected = run(model, training, optimizer, 10, first=10)
    model, training, optimizer = start(OBJECTIVES[objective], kappa_start=1.0, kappa_end=0.3)
    for target, state in zip((model, optimizer, training), saved, strict=True):
        target.load_state_dict(state)
    assert run(model, training, optimizer, 10, first=10) == expected


def test_kappa_mixes_the_clean_loss_in():
    x, y = data()
    values = []
    for kappa in (0.0, 0.5, 1.0):
        _model, training, _ = start(kappa_start=kappa, kappa_end=kappa, regularizer=None)
        training.schedule.at = 100
        values.append(training.loss(x, y).item())
    assert values[1] == pytest.approx((values[0] + values[2]) / 2, rel=1e-5)


def test_losses_come_per_example_too():
    x, y = data()
    model, training, _ = start(regularizer=None)
    training.schedule.at = 100
    each = training.loss(x, y, "none")
    assert each.shape == (256,)
    proved = margins(model, x, y, 0.05, lower=0.0, upper=1.0, options=BoundOptions(update_statistics=False))
    torch.testing.assert_close(each, robust_cross_entropy(proved.lower, "none"))


def test_labels_are_checked_also_while_the_box_is_a_point():
    _, training, _ = start()
    x, y = data()
    with pytest.raises(UsageError, match="labels must be between 0 and 3"):
        training.loss(x, y + 1)


def test_a_normalized_input_has_a_box_in_pixels():
    """The same network on pixels, and on normalized pixels with the normalization taken back."""
    x, y = data()
    torch.manual_seed(0)
    plain = net().eval()
    std, mean = torch.rand(6) + 0.5, torch.rand(6)

    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain

        def forward(self, x):
            return self.net(x * std + mean)

    one = verified_error(plain, [(x, y)], 0.02, lower=0.0, upper=1.0, attack_steps=0)
    two = verified_error(
        Back(), [((x - mean) / std, y)], 0.02, lower=-mean / std - 1e-6, upper=(1 - mean) / std + 1e-6, std=std,
        attack_steps=0,
    )  # fmt: skip
    torch.testing.assert_close(one.certificates.margins, two.certificates.margins, rtol=1e-4, atol=1e-4)
