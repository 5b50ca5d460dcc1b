"""The report as GitHub-flavored Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from weightsmith.lab.report import words
from weightsmith.lab.report.model import Report
from weightsmith.lab.stats import Judgement


def to_markdown(report: Report) -> str:
    """Lay a report out as Markdown: verdicts, table, how to read it, what was run.

    Args:
        report: From `weightsmith.lab.report.load`.

    Returns:
        The text, ending in a newline.
    """
    run = report.run
    parts = [f"# {_text(run['title'])}", _text(run.get("question", "")), *map(_text, words.answer(report))]
    parts += [f"> {_text(notice)}" for notice in words.notices(report)]
    if report.judgements:
        parts.append(f"**{report.headline}.**")
    for title, judgements in report.sections.items():
        parts += [f"## {title}", _claims(report, judgements)]
    parts += ["## Results", _results(report), words.TABLE_NOTE]
    if run.get("reading"):
        parts += ["## How to read it", _text(run["reading"])]
    parts += [
        "## What was run",
        _pairs("Run", words.facts(report)),
        _pairs("Configuration", words.settings(run["config"])),
    ]
    parts += [_pairs("Version of", words.versions(report))]
    if report.judgements:
        parts += ["## How verdicts are reached", *words.METHOD]
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(report: Report, judgements: Sequence[Judgement]) -> str:
    rows = []
    for judgement in judgements:
        found = words.evidence(report, judgement)
        interval = next((value for name, value in found.items() if name.endswith("interval")), words.NONE)
        reason = f" ({_text(words.why(judgement))})" if words.why(judgement) else ""
        rows.append(
            [
                f"{words.SYMBOLS[judgement.verdict]} **{judgement.verdict}**",
                _text(judgement.claim.text) + reason,
                *(_text(found[name]) for name in ("Compared", "Difference")),
                _text(interval),
                _text(found.get("Needed", found.get("Smallest relevant effect", words.NONE))),
                found["Paired seeds"],
                _text(found.get("In the paper", words.NONE)),
            ]
        )
    heads = [
        "Verdict",
        "Claim",
        "Compared",
        "Difference",
        "Interval",
        "Needed or worth having",
        "Seeds",
        "In the paper",
    ]
    return _table(heads, rows)


def _results(report: Report) -> str:
    best = {metric.name: report.best(metric) for metric in report.shown}
    rows = []
    for arm in report.planned_arms:
        row = [f"**{_text(arm.label)}** {_text(arm.text)}".strip(), words.seeds_of(report, arm.name)]
        for metric in report.shown:
            mean, sd = words.mean_and_sd(report.table[arm.name][metric.name], metric.format)
            mean = f"**{mean}**" if arm.name in best[metric.name] else mean
            few = words.fewer(report, arm.name, metric)
            row.append(" ".join(part for part in (mean, sd, few and f"({few})") if part))
        rows.append(row)
    heads = [_text(metric.label) + words.ARROWS[metric.better] for metric in report.shown]
    return _table(["Arm", "Seeds", *heads], rows, right=len(heads) + 1)


def _pairs(head: str, pairs: Mapping[str, str]) -> str:
    return _table([head, ""], ((_text(name), _text(value)) for name, value in pairs.items())) if pairs else ""


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]], right: int = 0) -> str:
    rule = ["---"] * (len(heads) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def _text(value: str) -> str:
    # names and sentences come from run.json: they may neither open a tag nor break a table
    return " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
