"""``weightsmith report`` and ``weightsmith verify``."""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from weightsmith.cli.console import complain, console, print_line
from weightsmith.core.errors import UsageError

if TYPE_CHECKING:
    from weightsmith.lab.report.receipt import Figure


def report(
    run_dirs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    page: Path | None = None,
    figures: Literal["svg", "png"] | None = None,
    receipt: Path | None = None,
    command: str = "",
) -> int:
    """Rebuild the report of one or several run folders and print it.

    Args:
        run_dirs: Folders that `weightsmith run` made, for example runs/adamp/0123456789ab.
        page: For several runs: path of the summary page; default: report.html beside them.
        figures: Also write every chart as a file, in the folder figures of the run.
        receipt: Also write the run as a small JSON file, which `weightsmith verify` can repeat.
        command: With --receipt: the command that reproduces the run.
    """
    from weightsmith.lab import report as reports

    if not run_dirs:
        raise UsageError("give at least one run folder")
    if receipt is not None and len(run_dirs) > 1:
        raise UsageError("--receipt goes with one run folder")
    for folder in run_dirs:
        loaded = reports.load(folder)
        written = reports.write_report(loaded, folder)
        console.print(reports.to_terminal(loaded))
        print_line(f"\nReport: {written.resolve()}")
        if figures is not None:
            files = reports.export_figures(folder, folder / "figures", figures)
            print_line(f"{len(files)} figures: {(folder / 'figures').resolve()}")
    if receipt is not None:
        from weightsmith.lab.report.receipt import write_receipt

        preset = loaded.run.get("preset") or "laptop"
        shown = f"weightsmith run {loaded.run['slug']}" + (f" --preset {preset}" if preset != "laptop" else "")
        write_receipt(loaded, command or shown, receipt)
        print_line(f"Receipt: {receipt.resolve()}")
    if len(run_dirs) > 1:
        parent = Path(os.path.commonpath([folder.resolve().parent for folder in run_dirs]))
        print_line(f"All of them: {reports.write_several(run_dirs, page or parent / 'report.html').resolve()}")
    return 0


def verify(
    receipt: tyro.conf.Positional[Path],
    /,
    *,
    seed: int | None = None,
    arms: tuple[str, ...] = (),
    tolerance: float = 0.02,
    spread: float = 0.0,
    data_dir: Path | None = None,
    workers: int | None = None,
) -> int:
    """Repeat one seed of a committed result and compare.

    Every metric is told: in how many arms it is the same to the last digit, and where it differs most, in test examples
    and in standard deviations over the seeds of the result. The exit code is 0 where all differences are accepted.

    Args:
        receipt: A file such as docs/measured/adamp/receipt.json.
        seed: Which seed; the first by default.
        arms: Which arms; all by default.
        tolerance: Largest relative difference of a metric that is accepted; so is one test example, and another choice
            between near equals, for example of a learning rate, where the rest of the job is within the tolerance.
        spread: Also accept this many standard deviations over the seeds. Other processors and library versions round
            differently, and a long training can amplify that to the size of another seed.
        data_dir: Folder with datasets by name (or set WEIGHTSMITH_DATA).
        workers: Number of parallel jobs.
    """
    from weightsmith.cli.run import find_experiment, use_data_dir
    from weightsmith.lab import report as reports
    from weightsmith.lab.report.receipt import compare, read_receipt
    from weightsmith.lab.run import run

    use_data_dir(data_dir)
    content = read_receipt(receipt)
    experiment = find_experiment(content["slug"])
    config = config_from(experiment.preset(content["preset"]), content["config"], receipt)
    known = sorted({job["seed"] for job in content["jobs"]})
    chosen = known[0] if seed is None else seed
    if chosen not in known:
        raise UsageError(f"seed {chosen} is not in {receipt}: it has {', '.join(map(str, known))}")
    there = [job["arm"] for job in content["jobs"] if job["seed"] == chosen]
    if missing := set(arms) - set(there):
        raise UsageError(f"seed {chosen} of arm {min(missing)!r} is not in {receipt}: it has {', '.join(there)}")
    with tempfile.TemporaryDirectory(prefix="weightsmith-verify-") as out:
        result = run(experiment, config, seeds=[chosen], arms=arms or there, out=Path(out), workers=workers)
        for failure in result.failures:
            complain(f"{failure.arm}, seed {failure.seed} failed: {failure.error}")
        figures = compare(content, reports.load(result.folder), tolerance, spread)
    for name in dict.fromkeys(figure.metric for figure in figures):
        _tell([figure for figure in figures if figure.metric == name])
    count = Counter(figure.state for figure in figures)
    accepted = f"{100 * tolerance:g} % of the value" + (f", {spread:g} of the spread over seeds" if spread else "")
    compared = (
        f"seed {chosen}: of {len(figures)} figures {count['equal']} to the digit, {count['within']} within {accepted} "
        f"or one test example, {count['choice']} by another choice, {count['beyond']} beyond"
    )
    if count["beyond"] or result.failures or not figures:
        complain(f"not as in {receipt} ({compared})")
        return 1
    print_line(f"as in {receipt} ({compared})", "green")
    return 0


def _tell(figures: Sequence["Figure"]) -> None:
    """One metric: where it is the same, where it differs most, and what is not within the tolerance."""
    name, different = figures[0].metric, [figure for figure in figures if figure.state != "equal"]
    line = f"{name}: {len(figures) - len(different)} of {len(figures)} arms to the digit"
    within = [figure for figure in different if figure.state == "within"]
    if within:
        line += f"; within the tolerance {len(within)}, the farthest {_change(max(within, key=_distance))}"
    print_line(line)
    for figure in different:
        if figure.state == "choice":
            print_line(f"  {_change(figure)}: another choice between near equals, the rest of the job agrees", "yellow")
        elif figure.state == "beyond":
            print_line(f"  {_change(figure)}: beyond the tolerance", "red")


def _distance(figure: "Figure") -> float:
    return abs(figure.now - figure.then) / max(abs(figure.then), 1e-12)


def _change(figure: "Figure") -> str:
    units = []
    if figure.examples is not None and math.isfinite(figure.examples):
        units.append(f"{figure.examples:.3g} test example{'' if round(figure.examples, 2) == 1 else 's'}")
    if figure.spreads is not None and math.isfinite(figure.spreads):
        units.append(f"{figure.spreads:.2g} of the spread over seeds")
    return f"{figure.arm} was {figure.then:.6g}, is {figure.now:.6g}" + (f" ({', '.join(units)})" if units else "")


def config_from(default: object, values: dict[str, object], source: Path) -> object:
    """A configuration of the default's type with values read from JSON.

    Raises:
        UsageError: A field is not known any more.
    """
    import dataclasses

    assert dataclasses.is_dataclass(default)
    assert not isinstance(default, type)
    fields = {field.name for field in dataclasses.fields(default)}
    unknown = sorted(values.keys() - fields)
    if unknown:
        raise UsageError(f"{source} has fields that this version does not know: {', '.join(unknown)}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return dataclasses.replace(default, **plain)
