"""The levels and the verdicts hold in simulations; `benchmarks/verdicts.py` prints the whole table."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats import LOOKS, Plan, Result, judge
from weightsmith.lab.stats.decisions import NAMES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


levels, verdicts = load("levels"), load("verdicts")
ROWS = {row.name: row for row in verdicts.ROWS}


def test_the_committed_shares_are_those_that_a_coarse_simulation_finds():
    p = levels.null_p_values(200_000, np.random.default_rng(1))
    shares = np.array(Plan().shares)
    assert np.allclose(shares / shares.sum(), levels.WEIGHTS, atol=0.005)
    for claims in levels.FAMILIES:
        level = 0.05 / claims
        assert levels.crossing(p, shares, claims) <= level + 3 * np.sqrt(level / len(p))
    assert min(levels.factor(p, claims) for claims in levels.FAMILIES) == pytest.approx(shares.sum(), rel=0.1)


@pytest.mark.parametrize(
    "row", ["7 claims, effects -1 to 1 sd", "3 claims, counts, sd 1", "seeds x examples, half each"]
)
def test_the_simulation_decides_as_judge_does(row):
    row = ROWS[row]
    values = row.draw(8, np.random.default_rng(2))
    step = row.step or 1e-6
    codes = verdicts.verdicts(values, worth=row.worth, step=step, plan=row.plan, crossed=values.ndim == 4)
    metric = Metric(name="m", label="M", better="higher", resolution=step)
    names = [f"arm {index}" for index in range(values.shape[1])]
    claims = [Claim(text=name, metric="m", winner=name, loser="base", worth=row.worth or None) for name in names]
    for family, expected in zip(values, codes, strict=True):
        for look, row_of_codes in zip(LOOKS, expected, strict=True):
            arms = {name: results(one[:look]) for name, one in zip(names, family, strict=True)}
            arms["base"] = results(np.zeros_like(family[0, :look]))
            judged = judge(claims, [metric], arms)
            assert [one.verdict for one in judged] == [NAMES[code] for code in row_of_codes]


def results(rows):
    if rows.ndim == 1:
        return {seed: Result({"m": float(value)}) for seed, value in enumerate(rows)}
    return {seed: Result({"m": float(row.mean())}, scores={"m": row}) for seed, row in enumerate(rows)}


@pytest.mark.slow
@pytest.mark.parametrize("row", verdicts.ROWS, ids=lambda row: row.name)
def test_at_most_5_percent_of_families_have_a_false_verdict(row):
    found = verdicts.measure(row, 20_000, np.random.default_rng(3))
    assert found["false"] <= 0.05 + 3 * found["error"]


@pytest.mark.slow
def test_an_effect_of_one_sd_is_found_by_20_seeds_with_at_most_14_on_average():
    found = verdicts.measure(ROWS["1 claim, effect 1 sd"], 20_000, np.random.default_rng(4))
    assert found["supported"] >= 0.9
    assert found["seeds"] <= 14


@pytest.mark.slow
@pytest.mark.parametrize("claims", ["1 claim", "7 claims"])
def test_no_relevant_effect_is_reached_when_the_sd_is_a_third_of_worth(claims):
    found = verdicts.measure(ROWS[f"{claims}, effect 0, sd worth / 3"], 10_000, np.random.default_rng(5))
    assert found["irrelevant"] >= 0.95
    assert found["seeds"] <= 10
