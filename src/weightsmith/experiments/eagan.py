"""Does evolution over shared weights find better GANs than chance, and does pairing help the second stage?

Per seed one search of stage 1 is done and shared: its winner is trained from scratch beside random architectures, the
winner of a random search with an equal budget, and the published generator. Three variants of stage 2 start from that
winner and its weights; the pair that each selects is trained from scratch as well.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from weightsmith.experiments.gan_pairs import Config, Outcome, data_of, from_scratch, step_seconds
from weightsmith.experiments.gan_searches import first_stage, rows_of, second_stage, shown_by, stored_supernet
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder
from weightsmith.lab.tasks import shared_task
from weightsmith.search import Individual, gan

_FREE, _TRANSFERS = "random", ("transfer", "transfer-published")


def arms(config: Config) -> list[Arm]:
    """The winner of stage 1 and its controls; stage 2 and its controls; the second data set, if there is one."""
    found = [
        Arm("evolved", "winner of stage 1, trained from scratch", "evolved G"),
        Arm(_FREE, "mean of random architectures, trained from scratch", "random G"),
        Arm("random-search", "best of a random search with an equal budget, from scratch", "random search"),
        Arm("published", "the generator of the paper, trained from scratch", "G* (paper)"),
        Arm("one-to-one", "stage 2: every D its own G, reset to the best", "stage 2"),
        Arm("no-reset", "stage 2 without weight resetting", "no reset"),
        Arm("many-to-one", "stage 2 with a single G for all D", "one shared G"),
    ]
    if config.transfer:
        found += [
            Arm("transfer", f"winner of stage 1 with D_S on {config.transfer}", f"evolved G, {config.transfer}"),
            Arm("transfer-published", f"G* with D_S on {config.transfer}", f"G*, {config.transfer}"),
        ]
    return found


def claims(config: Config) -> list[Claim]:
    """Better than chance; and what the second stage rests on."""
    name = config.distance_name
    return [
        Claim(
            text=f"The evolved generator has a lower {name} than random architectures on average", metric="distance",
            winner="evolved", loser=_FREE, primary=True, relative=True, worth=0.1,
            paper="CIFAR-10 FID: 10.14 after stage 1; not compared with random architectures",
        ),
        Claim(
            text=f"Evolution finds a generator with a lower {name} than random search with an equal budget",
            metric="distance", winner="evolved", loser="random-search", primary=True, relative=True, worth=0.1,
            paper="not compared",
        ),
        Claim(
            text="With weight resetting the generators of stage 2 are better on average", metric="partners",
            winner="one-to-one", loser="no-reset", relative=True, worth=0.1,
            paper="figure 7: without resetting stage 2 is unstable and ends worse",
        ),
        Claim(
            text="The pair of both stages beats that of stage 1", metric="distance", winner="one-to-one",
            loser="evolved", relative=True, worth=0.02, paper="CIFAR-10 FID 10.14 → 9.91",
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The distance from scratch, and what tells how far shared weights can be trusted."""
    name, score = config.distance_name, "IS" if config.inception else "CS"
    last = "Of the last round, without failed ones."
    found = [
        Metric("distance", f"{name} from scratch", "lower", ".1f", help="Of networks trained from scratch."),
        Metric("score", score, "higher", ".2f", help="Of the same networks."),
        Metric("shared", f"{name} with shared weights", "lower", ".1f", help="Of the winner, when its search ends."),
        Metric("parameters", "parameters", None, ",.0f", help="Of the stand-alone generator; in stage 2 of D."),
        Metric("median", "median of random ones", None, ".1f", help="A harder baseline than their mean."),
        Metric("luckiest", "best random one", None, ".1f", help="The lowest distance among them."),
        Metric("tau", "Kendall's tau", None, ".2f", help="Rank correlation of shared and from-scratch distances."),
        Metric("partners", f"mean {name}, stage 2", "lower", ".1f", help=last),
        Metric("worst_partner", f"worst {name}, stage 2", "lower", ".1f", help=last),
        Metric("best_partner", f"best {name}, stage 2", "lower", ".1f", help=last),
        Metric(
            "left_out",
            "failed, left out",
            None,
            ".0f",
            help="Networks that failed and are in none of the means.",
            failures=True,
        ),
    ]
    if config.transfer:
        found.append(Metric("transfer", f"{name} on {config.transfer}", "lower", ".1f", help="From scratch, with D_S."))
    return found


def _front(title: str, phase: str) -> Chart:
    return Chart(
        title=f"Pareto front, {title}", x="parameters", y="distance", kind="scatter", phase=phase, y_label="distance"
    )


CHARTS = (
    Chart(title="Population mean over rounds", x="round", y="mean", phase="rounds", y_label="mean distance"),
    Chart(title="Best of the population over rounds", x="round", y="best", phase="rounds", y_label="best distance"),
    _front("first round", "front-first"),
    _front("middle round", "front-middle"),
    _front("last round", "front-last"),
    Chart(
        title="Distance with shared weights and from scratch", x="shared", y="distance", kind="scatter",
        phase="genotypes", x_label="with shared weights", y_label="from scratch",
    ),
)  # fmt: skip


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Stage 1, once per seed: every arm but two builds on it."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = shown_by(Recorder(live=folder / "rows.jsonl"))
    found, supernet = first_stage(config, seed, folder / "stage-1", "nsga2", shown)
    return {
        "genotype": [list(cell) for cell in found.best.genotype],
        "shared": found.best.values["distance"],
        "supernet": supernet.state_dict(),
        "rows": rows_of(found),
    }


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Measure one arm with one seed; not every arm has every metric."""
    return {metric.name: None for metric in metrics(config)} | dict(_measured(config, job))


def _measured(config: Config, job: Job) -> Mapping[str, Value]:
    for row in job.start["rows"] if job.arm == "evolved" else []:
        job.record(row)
    winner = gan.GENERATOR_SPACE.check(job.start["genotype"])
    if job.arm == "evolved":
        return {"shared": job.start["shared"], **_final(config, job, winner)}
    if job.arm == "published":
        return _final(config, job, gan.GENERATORS["G*"])
    if job.arm in _TRANSFERS:
        genotype = winner if job.arm == "transfer" else gan.GENERATORS["G*"]
        found = _final(config.transferred(), job, genotype, "D_S")
        return {"transfer": found["distance"], "parameters": found["parameters"]}
    if job.arm == "random-search":
        return _random_search(config, job)
    return _random(config, job) if job.arm == _FREE else _second_stage(config, job, winner)


def _final(config: Config, job: Job, genotype: Any, discriminator: Any = None) -> dict[str, float]:
    found = from_scratch(config, job, genotype, discriminator or config.discriminator)
    job.diverged = job.diverged or found.failed
    return {"distance": found.distance, "score": found.score, "parameters": float(found.parameters)}


def _random_search(config: Config, job: Job) -> Mapping[str, Value]:
    found, _ = first_stage(config, job.seed, job.folder / "search", "random", shown_by(job.record))
    for row in rows_of(found):
        job.record(row)
    tried = [one for generation in found.generations for one in generation.scored if not one.failed]
    best = min(tried, key=lambda one: one.minimized) if tried else found.best
    return {"shared": best.values["distance"]} | _final(config, job, best.genotype)


def _second_stage(config: Config, job: Job, winner: Any) -> Mapping[str, Value]:
    found = second_stage(config, job, winner)
    for row in rows_of(found):
        job.record(row)
    last = found.generations[-1].scored
    distances = [one.values["distance"] for one in last if not one.failed] or [math.nan]
    best = found.best
    return {
        **_final(config, job, winner, best.genotype), "shared": best.values["distance"],
        "parameters": best.values["parameters"], "partners": float(np.mean(distances)),
        "worst_partner": max(distances), "best_partner": min(distances), "left_out": sum(one.failed for one in last),
    }  # fmt: skip


def _random(config: Config, job: Job) -> Mapping[str, Value]:
    """Random genotypes from scratch, and how well shared weights would have ranked them."""
    rng, supernet = np.random.default_rng([job.seed, 1]), stored_supernet(config, job)
    judge = gan.ScoreGenerator(data_of(config).reference, config.samples)
    good: list[Outcome] = []
    both: list[tuple[float, float]] = []
    for number in range(config.random_architectures):
        genotype = gan.GENERATOR_SPACE.sample(rng)
        found = from_scratch(config, job, genotype, config.discriminator, name=f"random-{number}")
        shared = judge(supernet, Individual(genotype, number, 0, job.seed))
        if not found.failed:
            good.append(found)
        if not found.failed and not shared["failed"]:
            both.append((shared["distance"], found.distance))
            row = {"shared": shared["distance"], "distance": found.distance, "parameters": found.parameters}
            job.record(row, phase="genotypes")
    failed = config.random_architectures - len(good)
    if not good:
        job.diverged = True
        return {"distance": math.nan, "left_out": failed}
    distances = [one.distance for one in good]
    tau = float(kendalltau(*zip(*both, strict=True)).statistic) if len(both) > 1 else math.nan
    return {
        "distance": float(np.mean(distances)), "score": float(np.mean([one.score for one in good])),
        "shared": float(np.mean([shared for shared, _ in both])) if both else None,
        "parameters": float(np.mean([one.parameters for one in good])), "median": float(np.median(distances)),
        "luckiest": min(distances), "tau": tau if math.isfinite(tau) else None, "left_out": failed,
    }  # fmt: skip


def steps(config: Config, arm: str) -> int:
    """Discriminator steps of a job; judging by as many images as two of its batches costs one.

    The search that all arms of a seed share is counted with its winner.
    """
    if arm in _TRANSFERS:
        return config.transfer_steps
    look = config.samples // (2 * config.gen_batch)
    final = config.final_steps + look * (config.final_steps // (config.judge_every or config.final_steps) + 2)
    search = config.warm_up + config.rounds * (config.steps or 1) + look * (config.rounds + 1) * config.population
    second = config.warm_up // 4 + config.rounds2 * config.bursts * config.n_critic2
    second += look * (config.rounds2 + 1) * config.population2
    more = {_FREE: (config.random_architectures - 1) * final, "random-search": search, "evolved": search}
    more |= dict.fromkeys(("one-to-one", "no-reset", "many-to-one"), second)
    return final + more.get(arm, 0)


EXPERIMENT = Experiment(
    slug="eagan",
    title="Evolved GANs against chance",
    question=(
        "Candidates that share weights are cheap to judge, and evolution keeps the better half of them. Is the "
        "generator that it selects better than chance when trained from scratch, and does a second stage find it a "
        "better opponent?"
    ),
    presets={
        "smoke": Config(
            train_examples=400, channels=4, dis_channels=4, latent=6, population=4, rounds=2, warm_up=8, steps=4,
            batch_size=8, gen_batch=8, samples=80, population2=4, rounds2=2, bursts=2, n_critic2=2, final_steps=8,
            judge_every=4, final_samples=80, random_architectures=2,
        ),
        "laptop": Config(
            data="mnist", side=16, channels=12, dis_channels=12, population=12, warm_up=150, steps=30, population2=6,
            rounds2=3, bursts=10, final_steps=200, random_architectures=6,
        ),
        "paper": Config(
            data="cifar10", validation_fraction=0.0, side=32, channels=256, dis_channels=128, latent=120, cell_gain=1.0,
            population=32, rounds=18, warm_up=62_500, steps=12_500, batch_size=40, gen_batch=80, lr_g=2e-4, lr_d=2e-4,
            samples=5000, population2=32, rounds2=18, bursts=2500, final_steps=750_000, final_critic=5,
            final_samples=50_000, judge_every=6_250, judge_after=375_000, ema=0.999, transfer="stl10",
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    start=start,
    task=shared_task,
    steps=steps,
    step_seconds=step_seconds,
    check=Config.check,
    reading=(
        "All distances are to the training images, by features of a small classifier of the data unless a file with "
        "Inception's weights is given: they are comparable within one data set and one number of images only. Of a "
        "training from scratch the state with the lowest distance is kept, chosen on other latents than it is judged "
        "on. The mean of random architectures leaves out those that fail and is pulled up by those that nearly do; "
        "their median and the luckiest of them are harder baselines. Kendall's tau tells how far the order with shared "
        "weights agrees with that from scratch: near zero means that the search selects by something else than final "
        "quality. Beating the mean is then no proof of more than avoiding bad architectures."
    ),
)  # fmt: skip
