"""Draw the README's picture, the first screen of a report, from a committed receipt: ``python docs/picture.py``.

Needs Chromium (or Chrome) on the path. The size of the file is kept small by a palette of 64 colors.
"""

import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from weightsmith.lab.experiment import Arm, Claim, Metric
from weightsmith.lab.record import JobResult
from weightsmith.lab.report.html import to_html
from weightsmith.lab.report.model import Report
from weightsmith.lab.report.receipt import read_receipt
from weightsmith.lab.stats import Judgement, Plan, summarize

ROOT = Path(__file__).parents[1]
RECEIPT, PICTURE = ROOT / "docs/measured/mwa/receipt.json", ROOT / "docs/report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT, SCALE = 1000, 900, 1.5
CROP = (0, 75, 1500, 1326)  # in pixels: an even margin above, no line cut in half below


def report_of(receipt: dict[str, Any]) -> Report:
    """A report with what a receipt has kept of it: all but curves and scores."""
    metrics = tuple(Metric(**metric) for metric in receipt["metrics"])
    arms = tuple(Arm(**arm) for arm in receipt["arms"])
    jobs = tuple(_job(job) for job in receipt["jobs"])
    table = {
        arm.name: {m.name: summarize([j.metrics[m.name] for j in jobs if j.arm == arm.name]) for m in metrics}
        for arm in arms
    }
    known = {field.name for field in fields(Judgement)}
    judgements = tuple(
        Judgement(
            **{name: _number(value, name) for name, value in found.items() if name in known - {"claim"}},
            claim=Claim(**found["claim"]),
        )
        for found in receipt["claims"]
    )
    seeds = tuple(sorted({job.seed for job in jobs}))
    plan = Plan(tuple(receipt["plan"]["looks"]))
    return Report(receipt, arms, metrics, (), seeds, jobs, 0, table, judgements, plan)


def _job(job: dict[str, Any]) -> JobResult:
    metrics = {name: math.nan if value is None else value for name, value in job["metrics"].items()}
    return JobResult(job["arm"], job["seed"], metrics, job["diverged"], [], {}, 0.0, 0.0, 0, 1, {}, "")


def _number(value: Any, name: str) -> Any:
    missing = value is None and name in ("difference", "low", "high", "level", "threshold", "p", "smallest")
    return math.nan if missing else value


def main() -> None:
    """Take the picture."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is on the path: install one")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "report.html"), Path(folder, "report.png")
        page.write_text(to_html(report_of(read_receipt(RECEIPT))))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}"]
        data = f"--user-data-dir={folder}/browser"
        subprocess.run([browser, *options, *size, data, f"--screenshot={shot}", page.as_uri()], check=True, timeout=100)
        with Image.open(shot) as picture:
            picture.crop(CROP).convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
