"""``weightsmith report`` and ``weightsmith verify``."""

import os
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from weightsmith.cli.console import complain, console, print_line
from weightsmith.core.errors import UsageError


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
    data_dir: Path | None = None,
    workers: int | None = None,
) -> int:
    """Repeat one seed of a committed result and compare.

    Args:
        receipt: A file such as docs/measured/adamp/receipt.json.
        seed: Which seed; the first by default.
        arms: Which arms; all by default.
        tolerance: Largest relative difference of a metric; other machines and library versions round differently.
        data_dir: Folder with datasets by name (or set WEIGHTSMITH_DATA).
        workers: Number of parallel jobs.
    """
    from weightsmith.cli.run import find_experiment, use_data_dir
    from weightsmith.lab import report as reports
    from weightsmith.lab.report.receipt import deviations, read_receipt
    from weightsmith.lab.run import run

    use_data_dir(data_dir)
    content = read_receipt(receipt)
    experiment = find_experiment(content["slug"])
    config = config_from(experiment.preset(content["preset"]), content["config"], receipt)
    known = sorted({job["seed"] for job in content["jobs"]})
    chosen = known[0] if seed is None else seed
    if chosen not in known:
        raise UsageError(f"seed {chosen} is not in {receipt}: it has {', '.join(map(str, known))}")
    wanted = arms or tuple(arm["name"] for arm in content["arms"])
    with tempfile.TemporaryDirectory(prefix="weightsmith-verify-") as out:
        result = run(experiment, config, seeds=[chosen], arms=wanted, out=Path(out), workers=workers)
        for failure in result.failures:
            complain(f"{failure.arm}, seed {failure.seed} failed: {failure.error}")
        repeated = reports.load(result.folder)
        found = deviations(content, repeated, tolerance)
    compared = f"seed {chosen}, {len(repeated.jobs)} arms, tolerance {tolerance:.0%}"
    for item in found:
        print_line(f"{item.arm}: {item.metric} was {item.then:.6g}, is {item.now:.6g}", "yellow")
    if found or result.failures:
        complain(f"not as in {receipt} ({compared})")
        return 1
    print_line(f"as in {receipt} ({compared})", "green")
    return 0


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
