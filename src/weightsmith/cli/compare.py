"""``weightsmith compare``: the user's own training, with techniques or against other commands."""

import math
import re
from dataclasses import replace
from typing import Annotated, Any

import tyro
from rich.table import Table

from weightsmith.cli.console import console, print_line
from weightsmith.cli.run import RunOptions, complain_of, do_jobs, execute
from weightsmith.core.errors import UsageError
from weightsmith.experiments.recipes import recipes
from weightsmith.lab.compare import BASELINE, Comparison, compare_commands, compare_function, direction
from weightsmith.lab.experiment import Experiment
from weightsmith.lab.record import JobResult, read_jobs
from weightsmith.lab.run import seeds_of
from weightsmith.lab.stats import noise as noise_of
from weightsmith.lab.stats.looks import FEWEST

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_NOISE_SEEDS = "5"


def compare(
    function: tyro.conf.Positional[str] = "",
    /,
    *,
    metric: str,
    with_: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="with")] = (),
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    worth: float | None = None,
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    choose_by: str = "",
    noise: bool = False,
    options: tyro.conf.OmitArgPrefixes[RunOptions] = RunOptions(),
) -> int:
    """Compare your own training with and without techniques, or any commands with each other.

    Give either a function, which is called with a trial (see the documentation), and techniques to put on it with
    --with; or two or more --arm 'name: command', the first of which is the baseline.

    Args:
        function: Your training function: file.py:function or module:function.
        metric: The number that decides; add :higher or :lower if the name does not imply it.
        with_: A technique, or several joined by +; may be given several times.
        arm: 'name: command' with {seed} in it; prints JSON lines, or writes them to $WEIGHTSMITH_RESULT.
        worth: Smallest relevant effect, in the metric's unit; smaller differences count as none.
        sweep: name=value,value: try every arm at these values; for a function's lr also multiples, lr=0.5x,1x,2x.
        choose_by: The number by which swept values are chosen, such as val_loss; default: the metric.
        noise: Run only the baseline, and report the smallest effect that a number of seeds can detect.
        options: How the comparison is run.
    """
    if bool(function) == bool(arm):
        raise UsageError("give either a function (file.py:function) or two or more --arm 'name: command'")
    arms = _commands(arm) if arm else ((BASELINE, ""), *((techniques, techniques) for techniques in with_))
    arms = arms[:1] if noise else arms
    if len(arms) < 2 and not noise:
        need = "another --arm" if arm else "--with TECHNIQUE"
        raise UsageError(f"there is nothing to compare with: give {need}, or --noise")
    if len({name for name, _ in arms}) < len(arms):
        raise UsageError(f"arms must have different names, got {', '.join(name for name, _ in arms)}")
    name, better = direction(metric)
    chosen_by, choose_better = direction(choose_by) if choose_by else (name, better)
    comparison = Comparison(
        what=function,
        arms=arms,
        metric=name,
        better=better,
        worth=worth,
        sweep=tuple(_values(text) for text in sweep),
        choose_by=chosen_by,
        choose_better=choose_better,
        time_limit=options.time_limit,
    )
    if function:
        experiment = compare_function(function, comparison, recipes)
    else:  # machines of a cluster may have other programs than this one
        experiment = compare_commands(comparison, here=options.address is None)
    if noise:
        return _noise(experiment, comparison, options)
    return execute(experiment, comparison, options)


def _noise(experiment: Experiment[Any], comparison: Comparison, options: RunOptions) -> int:
    options = replace(options, seeds=_NOISE_SEEDS) if options.seeds == "auto" else options
    seeds = seeds_of(options.seeds)
    if (seeds if isinstance(seeds, int) else len(seeds)) < FEWEST:
        raise UsageError(f"--noise needs at least {FEWEST} seeds, got --seeds {options.seeds}")
    result = do_jobs(experiment, comparison, options)
    if result is None:
        return 0
    if result.failures:
        complain_of(result)
        return 1
    asked = {*result.finished, *result.skipped}  # the folder may hold more seeds, of earlier runs
    jobs = [job for job in read_jobs(result.folder) if isinstance(job, JobResult) and (job.arm, job.seed) in asked]
    values = [job.metrics[comparison.metric] for job in jobs]
    table = Table(box=None, pad_edge=False)
    table.add_column("seeds", justify="right")
    table.add_column(f"smallest difference in {comparison.metric} detected with 80 % power")
    found = noise_of(values, seeds=(3, 5, 10, 20, 50))
    for n, effect in found.effects.items():
        table.add_row(str(n), f"{effect:.3g}")
    print_line(
        f"{found.n} seeds of the baseline: {min(values):.5g} to {max(values):.5g}, standard deviation {found.sd:.3g}"
    )
    console.print(table)
    print_line("This assumes two arms of equal variance; shared seeds can only improve it.", "dim")
    return 0


def _commands(given: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for text in given:
        name, colon, command = text.partition(":")
        if not colon or not _NAME.fullmatch(name.strip()) or not command.strip():
            raise UsageError(f"--arm must be 'name: command', the name of letters and digits, got {text!r}")
        found.append((name.strip(), command.strip()))
    return tuple(found)


def _values(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, values = text.partition("=")
    found = tuple(value.strip() for value in values.split(",") if value.strip())
    for value in found:
        try:
            finite = math.isfinite(float(value.removesuffix("x")))
        except ValueError:
            finite = False
        if not finite:
            raise UsageError(f"--sweep takes name=number,number, got {text!r}")
    if not equals or not name or len(set(found)) < max(2, len(found)):
        raise UsageError(f"--sweep takes name=value,value with at least two different values, got {text!r}")
    return name.strip(), found
