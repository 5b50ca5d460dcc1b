"""Turn the committed receipts into the gallery and the figures of cards.

``docs/measured/<slug>/receipt.json`` is the answer on the bundled data; other files beside it ask again on others.
"""

from pathlib import Path
from typing import Any

from weightsmith.lab.experiment import Metric
from weightsmith.lab.report.receipt import read_receipt
from weightsmith.lab.report.words import ARROWS, NONE, SYMBOLS, mean_and_sd
from weightsmith.lab.stats import summarize
from weightsmith.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Measured

What the experiments gave on a machine with two CPU cores, as it fell, also where a claim did not hold. This page is
written from the committed results, `docs/measured/<technique>/*.json`, by `make tables`;
`weightsmith verify docs/measured/mwa/receipt.json` repeats one seed of a result and compares. What the verdicts mean is
told in [the lab](lab.md#what-a-verdict-means).
"""


def receipts() -> dict[str, list[dict[str, Any]]]:
    """The committed results of each technique, in the order of the techniques."""
    found = {}
    for technique in TECHNIQUES:
        paths = sorted((ROOT / "docs" / "measured" / technique.slug).glob("*.json"))
        if paths:
            paths.sort(key=lambda path: path.name != "receipt.json")
            found[technique.slug] = [read_receipt(path) for path in paths]
    return found


def gallery() -> str:
    """The page over all results."""
    parts = [INTRODUCTION]
    for slug, results in receipts().items():
        title = next(card.title for card in TECHNIQUES if card.slug == slug)
        parts.append(f"## {title}\n")
        for receipt in results:
            parts += [command(receipt), answer(receipt), claims(receipt), arms(receipt)]
        parts.append(f"More in [the method card](techniques/{slug}.md).\n")
    return "\n".join(parts)


def card(results: list[dict[str, Any]]) -> str:
    """What a method card says of the committed results."""
    return "\n".join(f"{command(receipt)}\n{answer(receipt)}\n{claims(receipt)}" for receipt in results)


def command(receipt: dict[str, Any]) -> str:
    """What gave a result."""
    return f"```console\n$ {receipt['command']}\n```\n"


def summary() -> str:
    """Some results for the front page: for each verdict the primary claim with the most seeds."""
    lines = ["| command | asked | found |", "|---|---|---|"]
    claims = [
        (receipt, claim)
        for receipt, *_ in receipts().values()
        for claim in receipt["claims"]
        if claim["claim"]["primary"]
    ]
    for verdict in ("supported", "refuted", "no relevant effect", "undecided"):
        found = [pair for pair in claims if pair[1]["verdict"] == verdict]
        if found:
            receipt, claim = max(found, key=lambda pair: pair[1]["n"])
            command, text = receipt["command"].partition("#")[0].strip(), _plain(claim["claim"]["text"])
            lines.append(f"| `{command}` | {text} | {SYMBOLS[verdict]} **{verdict}**: {_size(claim)} |")
    return "\n".join(lines) + "\n"


def answer(receipt: dict[str, Any]) -> str:
    """The first screen of the report."""
    first, *_, advice = receipt["answer"]
    return f"{_plain(first)} **{_plain(advice)}** {receipt['headline']}.\n"


def claims(receipt: dict[str, Any]) -> str:
    """A table of verdicts."""
    lines = ["| verdict | claim | found | in the paper |", "|---|---|---|---|"]
    for claim in sorted(receipt["claims"], key=lambda claim: not claim["claim"]["primary"]):
        verdict = f"{SYMBOLS[claim['verdict']]} **{claim['verdict']}**"
        paper = claim["claim"]["paper"] or NONE
        lines.append(f"| {verdict} | {_plain(claim['claim']['text'])} | {_size(claim)} | {_plain(paper)} |")
    return "\n".join(lines) + "\n"


def arms(receipt: dict[str, Any]) -> str:
    """A table of means and standard deviations over seeds."""
    metrics = [Metric(**metric) for metric in receipt["metrics"]]
    heads = " | ".join(metric.label + ARROWS[metric.better] for metric in metrics)
    lines = [f"| arm | seeds | {heads} |", "|---|---:|" + "---:|" * len(metrics)]
    for arm in receipt["arms"]:
        jobs = [job for job in receipt["jobs"] if job["arm"] == arm["name"]]
        cells = [" ".join(mean_and_sd(_summary(jobs, metric.name), metric.format)).strip() for metric in metrics]
        lines.append(f"| **{arm['title'] or arm['name']}** {_plain(arm['text'])} | {len(jobs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summary(jobs: list[dict[str, Any]], metric: str) -> Any:
    values = [job["metrics"].get(metric) for job in jobs]
    return summarize([value for value in values if value is not None])


def _size(claim: dict[str, Any]) -> str:
    evidence = claim["evidence"]
    interval = next((value for name, value in evidence.items() if name.endswith("interval")), "")
    text = f"{evidence['Compared']}: {evidence['Difference']}"
    return _plain(text + (f" ({interval})" if interval else ""))


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
