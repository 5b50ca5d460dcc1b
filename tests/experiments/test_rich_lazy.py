"""The linear theory against reference values, and the tasks against their description."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightsmith.core.errors import UsageError
from weightsmith.experiments import decisions, rich_lazy
from weightsmith.experiments.linear_network import expected_alignment, measure, trained_alignment
from weightsmith.experiments.starts import start_
from weightsmith.init import low_rank_
from weightsmith.lab.tasks import make_task

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "rich-lazy.safetensors")
SMOKE = rich_lazy.EXPERIMENT.preset("smoke")


def test_the_linear_network_is_as_in_the_reference():
    g, beta, sigma = GOLDEN["linear/G"], GOLDEN["linear/beta"], float(GOLDEN["linear/sigma"])
    zero = torch.zeros(12, dtype=torch.float64)
    for rank, simulated, formula, *_ in GOLDEN["linear/rows"][:4].tolist():
        first = low_rank_(torch.empty_like(g), int(rank), base=g)
        first *= sigma / first.norm()
        assert trained_alignment(first, zero, beta) == pytest.approx(simulated, abs=1e-4)
        assert expected_alignment(first, zero, beta) == pytest.approx(formula, abs=1e-4)
    u, b = torch.ones(12, dtype=torch.float64) / 12**0.5, beta / beta.norm()
    aligned = sigma * torch.outer(u, b)
    for readout, row in ((zero, 4), (sigma * u, 5)):
        _, simulated, closed, *_ = GOLDEN["linear/rows"][row].tolist()
        assert trained_alignment(aligned, readout, beta) == pytest.approx(simulated, abs=1e-4)
        assert expected_alignment(aligned, readout, beta) == pytest.approx(closed, abs=1e-4)


def test_an_aligned_balanced_start_stays_as_it_is():
    beta = torch.randn(20, dtype=torch.float64)
    u = torch.full((30,), 30**-0.5, dtype=torch.float64)
    assert trained_alignment(1e-3 * torch.outer(u, beta / beta.norm()), 1e-3 * u, beta) == pytest.approx(1, abs=1e-4)


def started(arm, size=40):
    return start_(torch.empty(size, size), arm, 1.25, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("arm", ["r1-frobenius", "r20-frobenius", "r20-both", "orthogonal"])
def test_a_start_keeps_the_frobenius_norm_of_full_rank(arm):
    assert started(arm).norm() == pytest.approx(started("full").norm().item(), rel=1e-5)


@pytest.mark.parametrize("arm", ["r1-spectral", "r20-spectral", "r20-both", "r3-both"])
def test_a_start_keeps_the_spectral_norm_of_full_rank(arm):
    largest = torch.linalg.svdvals(started("full"))[0].item()
    found = torch.linalg.svdvals(started(arm))
    assert found[0] == pytest.approx(largest, rel=1e-5)
    assert (found > 1e-5 * found[0]).sum() == int(arm[1:].split("-")[0])


def test_a_rank_too_low_for_both_norms_has_equal_singular_values():
    found = torch.linalg.svdvals(started("r3-both"))[:3]
    assert found[2] == pytest.approx(found[0].item(), rel=1e-5)


def in_linear_network(arm, seed=0):
    return measure(arm, seed, lambda w, name, generator: start_(w, name, 1.25, generator))


def test_the_theory_matches_small_starts_of_every_rank_and_norm():
    for arm in ("r1-frobenius", "r5-frobenius", "r10-spectral", "full", "orthogonal"):
        found = in_linear_network(arm)
        assert found["linear_gap"] < 1e-4
        assert found["linear_gap_0.1"] < 0.005
        assert found["linear_1"] > 0


def test_the_theory_does_not_hold_for_large_starts():
    gaps = [in_linear_network("r5-frobenius", seed)["linear_gap_1"] for seed in range(3)]
    assert sum(gaps) / 3 > 0.02


def test_an_aligned_start_is_lazy_and_ranks_are_ordered():
    assert in_linear_network("aligned")["linear"] == pytest.approx(1, abs=1e-4)
    means = [
        sum(in_linear_network(arm, seed)["linear"] for seed in range(5)) / 5
        for arm in ("r1-frobenius", "r5-frobenius", "r10-frobenius", "full", "orthogonal")
    ]
    assert means == sorted(means)


def draw(name, count=4000):
    return getattr(decisions, name)(count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "channels"), [("_two_alternatives", 3), ("_matching", 3), ("_context", 7)])
def test_a_trial_fixates_and_then_decides(name, channels):
    inputs, targets = draw(name)
    assert inputs.shape == (4000, 8, channels)
    assert not targets[:, :-1].any()
    assert set(targets[:, -1].tolist()) == {1, 2}
    assert abs((targets[:, -1] == 1).float().mean() - 0.5) < 0.05
    fixation = inputs[:, :, 0].mean(0)
    assert torch.allclose(fixation[:-1], torch.ones(7), atol=0.02)
    assert fixation[-1] == 0


def test_the_stimulus_of_two_alternatives_is_that_of_the_choice():
    inputs, targets = draw("_two_alternatives")
    difference = (inputs[:, :-1, 1] - inputs[:, :-1, 2]).mean(1)
    first = targets[:, -1] == 1
    mean = (0 + 6.4 + 12.8 + 25.6 + 51.2) / 5 / 100
    assert difference[first].mean() == pytest.approx(mean, abs=0.02)
    assert difference[~first].mean() == pytest.approx(-mean, abs=0.02)
    assert (inputs[:, :-1, 1] + inputs[:, :-1, 2]).std() == pytest.approx(0.1 * 2**0.5, rel=0.05)
    assert not inputs[:, -1, 1:].any()


def test_matching_shows_two_stimuli_with_a_delay_between():
    inputs, targets = draw("_matching")
    assert not inputs[:, 1:6, 1:].any()
    same = (inputs[:, 0, 1] > 0.5) == (inputs[:, 6, 1] > 0.5)
    assert torch.equal(same, targets[:, -1] == 1)


def test_the_context_says_which_modality_counts():
    inputs, targets = draw("_context")
    relevant = inputs[:, 2:, 6].mean(1).long()
    assert set(relevant.tolist()) == {0, 1}
    assert not inputs[:, 2:, 1:5].any()
    signed = (inputs[:, :2, 1::2] - inputs[:, :2, 2::2]).mean(1)[:, :2]
    mine = signed[torch.arange(4000), relevant]
    strong = mine.abs() > 0.3
    assert torch.equal(mine[strong] > 0, targets[strong, -1] == 1)
    assert torch.equal(inputs[:, 7, 5:].sum(1), torch.ones(4000))


def test_rows_of_images_count_at_the_last_step_alone():
    task = make_task(replace(SMOKE, task="weightsmith.experiments.decisions:rows_of_images", train_examples=50))
    batch = task.example()
    assert batch.inputs.shape == (8, 8, 8)
    assert (batch.targets[:, :-1] == decisions.IGNORED).all()
    model = task.build()
    losses = task.losses(model, batch)
    expected = torch.nn.functional.cross_entropy(model(batch.inputs)[:, -1], batch.targets[:, -1], reduction="none")
    torch.testing.assert_close(losses, expected)
    assert decisions.last_alone(task)
    assert not decisions.last_alone(make_task(SMOKE))


def test_the_time_constant_mixes_old_and_new():
    model = decisions.Rnn(3, 5, 2, alpha=0.25)
    x = torch.randn(2, 1, 3)
    expected = model.readout(torch.relu(0.25 * model.input(x[:, 0])))
    torch.testing.assert_close(model(x)[:, 0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (8, 1)}, "ranks must rise"),
        ({"ranks": (0, 3)}, "ranks must rise"),
        ({"ranks": (1, 24)}, "ranks must be below units=24"),
        ({"batch_sizes": (3, 4)}, "one number per task"),
        ({"gain": 0.0}, "gain must be above 0"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        rich_lazy.EXPERIMENT.check(replace(SMOKE, **changes))
