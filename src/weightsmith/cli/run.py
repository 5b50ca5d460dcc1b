"""``weightsmith run``: an experiment of ours, of another package, or of a file."""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from weightsmith.cli.console import complain, console, print_line
from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.load import load_object
from weightsmith.lab.engines import Failure
from weightsmith.lab.engines.distributed import is_leader
from weightsmith.lab.experiment import Experiment
from weightsmith.lab.report.words import duration
from weightsmith.lab.run import Estimate, Run, estimate, seeds_of
from weightsmith.lab.run import run as run_experiment
from weightsmith.techniques import TECHNIQUES, technique

GROUP = "weightsmith.experiments"
"""Entry points of other packages' experiments."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How an experiment is run."""

    seeds: str = "auto"
    """auto (3, then 5, 10, 20 seeds, until the primary claims are decided), a number, or numbers joined by commas."""
    arms: tuple[str, ...] = ()
    """Run only these arms; claims about the others still count in the correction for multiple tests."""
    out: Path = Path("runs")
    """Parent of the run folders. Jobs that have finished there are not run again."""
    engine: Literal["local", "ray"] = "local"
    """Where jobs run: in local processes, or on a Ray cluster."""
    address: str | None = None
    """Address of the Ray cluster; one is started on this machine when none is given."""
    workers: int | None = None
    """Number of parallel jobs; default: one per core, or per GPU."""
    time_limit: float | None = None
    """Time limit per job, in seconds."""
    fresh: bool = False
    """Start over: delete the results of an earlier run with the same settings."""
    dry_run: bool = False
    """Print the jobs with estimated time and memory, without running them."""
    data_dir: Path | None = None
    """Folder with datasets by name, in the layout of the Hugging Face hub (or set WEIGHTSMITH_DATA)."""
    tracker: str | None = None
    """Also log to an experiment tracker that Accelerate knows: tensorboard, wandb, mlflow ..."""


def prepare_run(arguments: list[str]) -> Callable[..., int]:
    """Build the command of the experiment that ``arguments`` name; spells ``--set`` out in them."""
    if len(arguments) < 2 or arguments[1].startswith("-"):
        return run
    experiment, preset = find_experiment(arguments[1]), _preset(arguments)
    default = experiment.preset(preset)
    arguments[:] = _spell_out(arguments, default)

    def run_one(
        slug: tyro.conf.Positional[str],
        /,
        config: tyro.conf.OmitArgPrefixes[tyro.conf.FlagConversionOff[type(default)]] = default,  # type: ignore[valid-type]
        preset: Annotated[str, tyro.conf.arg(metavar="|".join(experiment.presets))] = preset,
        options: tyro.conf.OmitArgPrefixes[RunOptions] = RunOptions(),
        set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    ) -> int:
        """Find out whether a technique helps: run its experiment, judge its claims, write a report.

        Args:
            slug: A name from `weightsmith techniques`, or module:NAME or file.py:NAME of an experiment.
            config: The configuration that the preset sets; every field can be overridden.
            preset: Configuration to start from: smoke (seconds), laptop (minutes), paper (the paper's setting).
            options: How the experiment is run.
            set: key=value, the same as --key value; may be given several times.
        """
        return execute(experiment, config, options, preset)

    return run_one


def run(slug: tyro.conf.Positional[str], /) -> int:
    """Find out whether a technique helps: run its experiment, judge its claims, write a report.

    `weightsmith run NAME --help` lists the options and the fields of that experiment's configuration.

    Args:
        slug: A name from `weightsmith techniques`, or module:NAME or file.py:NAME of an experiment.
    """
    find_experiment(slug)
    return 0


def find_experiment(slug: str) -> Experiment[Any]:
    """Find an experiment by the technique's slug, an entry point, ``module:NAME`` or ``file.py:NAME``.

    Raises:
        UsageError: There is none.
    """
    if ":" in slug:
        found = load_object(slug, "experiment")
    elif others := list(metadata.entry_points(group=GROUP, name=slug)):
        found = others[0].load()
    else:
        card = technique(slug)
        if card.experiment is None:
            available = ", ".join(card.slug for card in TECHNIQUES if card.available)
            raise UsageError(f"{slug} is announced but not in this version yet; available: {available}")
        experiment: Experiment[Any] = importlib.import_module(card.experiment).EXPERIMENT
        return experiment
    if not isinstance(found, Experiment):
        raise UsageError(f"{slug} must be a weightsmith.lab.experiment.Experiment, got {type(found).__name__}")
    return found


def execute(experiment: Experiment[Any], config: Any, options: RunOptions, preset: str = "laptop") -> int:
    """Run an experiment, show its report, and tell what failed; gives the exit code."""
    from weightsmith.lab import report as reports
    from weightsmith.lab.track import check_tracker, track

    if options.tracker is not None:
        check_tracker(options.tracker)
    started = time.perf_counter()
    result = do_jobs(experiment, config, options, preset)
    if result is None:
        return 0
    if not is_leader():
        return 1 if result.failures else 0
    if options.tracker is not None:
        track(result, options.tracker)
    for line in result.news:
        print_line(line, "yellow")
    if result.finished or result.skipped:
        report = reports.load(result.folder)
        page = reports.write_report(report, result.folder)
        console.print(reports.to_terminal(report))
        done = f"{len(result.finished)} jobs run, {len(result.skipped)} reused, {time.perf_counter() - started:.0f} s"
        print_line(f"\n{done}\nReport: {page.resolve()}")
    complain_of(result)
    return 1 if result.failures else 0


def complain_of(result: Run) -> None:
    """Print what failed, equal errors once."""
    by_error: dict[str, list[Failure]] = {}
    for failure in result.failures:
        by_error.setdefault(failure.error, []).append(failure)
    for error, (first, *others) in by_error.items():
        trace = result.folder / first.arm / f"seed-{first.seed}.error.txt"
        more = f" and {_count(len(others), 'other job')}" if others else ""
        complain(f"{first.arm}, seed {first.seed}{more} failed: {error}\n  details: {trace}")


def do_jobs(experiment: Experiment[Any], config: Any, options: RunOptions, preset: str = "laptop") -> Run | None:
    """Tell what the jobs of an experiment cost, and do them; ``None``: only the cost was asked for."""
    from weightsmith.lab.watching import watching

    use_data_dir(options.data_dir)
    seeds = seeds_of(options.seeds)
    if options.dry_run:
        _announce(
            estimate(
                experiment,
                config,
                seeds=seeds,
                arms=options.arms,
                workers=options.workers,
                out=options.out,
                fresh=options.fresh,
            )
        )
        return None
    return run_experiment(
        experiment,
        config,
        preset=preset,
        seeds=seeds,
        arms=options.arms,
        out=options.out,
        engine=options.engine,
        address=options.address,
        workers=options.workers,
        time_limit=options.time_limit,
        fresh=options.fresh,
        announce=_announce,
        watch=lambda run, total: watching(console, run, total),
    )


def use_data_dir(folder: Path | None) -> None:
    """Look for data sets in this folder first, here and in every worker; ``None``: as before."""
    if folder is not None:
        os.environ["WEIGHTSMITH_DATA"] = str(folder.resolve())


def _announce(found: Estimate) -> None:
    least, most = min(found.jobs), max(found.jobs)
    span = f"{_count(found.jobs[least], 'job')} ({_count(least, 'seed')})"
    if most != least:
        span += f" to {found.jobs[most]} jobs ({most} seeds), as many as it takes to decide"
    line = f"{span}, {found.workers} at a time"
    if found.seconds is None:
        line += "; time unknown before a job has finished"
    else:
        times = " to ".join(duration(found.seconds[count]) for count in dict.fromkeys((least, most)))
        if found.finished:
            line += f"; about {times} for those not done yet, by {_count(found.finished, 'finished job')}"
        else:
            line += f"; about {times} {'in all' if found.whole else 'of training'} by one timed step"
            line += "" if found.whole else ", evaluations not counted"
    line += "; memory unknown" if found.memory is None else f"; {found.memory / 2**20:,.0f} MiB each"
    print_line(line, "dim")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _preset(arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
    return "laptop"


def _spell_out(arguments: list[str], config: Any) -> list[str]:
    """Turn every ``--set key=value`` into ``--key value``, so that types are checked in one place."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    spelled: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--set" and not argument.startswith("--set="):
            spelled.append(argument)
            continue
        pair = next(rest, "") if argument == "--set" else argument.removeprefix("--set=")
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set takes key=value, got {pair!r}")
        if key not in fields:
            raise unknown("field", key, fields)
        values = value.split(",") if isinstance(fields[key], tuple) else [value]
        if isinstance(fields[key], bool):
            values = [value.capitalize()]
        spelled += [f"--{key.replace('_', '-')}", *values]
    return spelled
