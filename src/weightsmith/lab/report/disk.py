"""From a run folder to a report, and the report's files beside the results."""

from pathlib import Path
from typing import Any

from weightsmith.core.display import is_number_format, printable
from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_atomically
from weightsmith.lab.experiment import Arm, Chart, Claim, Metric
from weightsmith.lab.record import JobResult, read_jobs, read_run, results_of
from weightsmith.lab.report.html import to_html
from weightsmith.lab.report.markdown import to_markdown
from weightsmith.lab.report.model import Report
from weightsmith.lab.report.pictures import pictures
from weightsmith.lab.stats import Plan, judge, summarize


def load(run_folder: Path) -> Report:
    """Read a run, finished or not, and judge its claims.

    Args:
        run_folder: A folder with ``run.json`` and finished jobs under ``<arm>/seed-<k>/``.

    Raises:
        UsageError: The folder is no run, or ``run.json`` is damaged; damaged jobs are listed in the report instead.
    """
    run = _printable(read_run(run_folder))
    try:
        arms = tuple(Arm(**item) for item in run["arms"])
        metrics = tuple(Metric(**item) for item in run["metrics"])
        claims = tuple(Claim(**item) for item in run["claims"])
        charts = tuple(Chart(**item) for item in run["charts"])
        seeds = tuple(int(seed) for seed in run["seeds"])
        plan = Plan(looks=tuple(int(look) for look in run["plan"]["looks"]))
        if not all(is_number_format(metric.format) for metric in metrics):
            raise ValueError("a metric's format is not one of numbers")
        if not {metric.better for metric in metrics} <= {"higher", "lower", None}:
            raise ValueError("a metric is neither better when higher nor when lower")
        if not {claim.metric for claim in claims} <= {metric.name for metric in metrics}:
            raise ValueError("a claim names a metric that is not there")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{run_folder / 'run.json'} is damaged ({type(error).__name__}: {error}); "
            "run the experiment again with the same settings to replace it"
        ) from error

    read = list(read_jobs(run_folder))
    found = {(job.arm, job.seed): job for job in read if isinstance(job, JobResult)}
    jobs = tuple(found[key] for arm in arms for seed in seeds if (key := (arm.name, seed)) in found)
    table = {
        arm.name: {
            metric.name: summarize(
                [job.metrics[metric.name] for job in jobs if job.arm == arm.name and metric.name in job.metrics]
            )
            for metric in metrics
        }
        for arm in arms
    }
    judgements = tuple(judge(claims, metrics, results_of(jobs), plan=plan))
    damaged = tuple(str(item) for item in read if not isinstance(item, JobResult))
    kept = pictures(run_folder, arms, jobs)
    strays = len(found) - len(jobs)
    return Report(run, arms, metrics, charts, seeds, jobs, strays, table, judgements, plan, damaged, kept)


def _printable(content: Any) -> Any:
    """The same content with texts that cannot steer a terminal."""
    if isinstance(content, dict):
        return {name: _printable(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_printable(value) for value in content]
    return printable(content) if isinstance(content, str) else content


def write(run_folder: Path) -> Path:
    """Load a run and write its report beside it, see `write_report`.

    Args:
        run_folder: As for `load`.

    Returns:
        The path of ``report.html``.

    Raises:
        UsageError: As for `load`; nothing is written then.
    """
    return write_report(load(run_folder), run_folder)


def write_report(report: Report, run_folder: Path) -> Path:
    """Write ``report.md`` and ``report.html`` into a run folder, each as a whole.

    Args:
        report: From `load`.
        run_folder: Where they go.

    Returns:
        The path of ``report.html``.
    """
    page = run_folder / "report.html"
    write_atomically(run_folder / "report.md", to_markdown(report))
    write_atomically(page, to_html(report))
    return page
