import dataclasses
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.gallery import Picture, keep_gallery
from weightsmith.lab.record import JobResult, job_folder, write_job, write_run
from weightsmith.lab.report import (
    export_figures,
    load,
    show,
    to_html,
    to_markdown,
    to_terminal,
    words,
    write,
    write_several,
)
from weightsmith.lab.report.receipt import compare, read_receipt, receipt_of, write_receipt
from weightsmith.lab.report.words import number

NAN = math.nan
ARMS = (Arm("new", "the technique"), Arm("old", "the baseline"))
ACCURACY = Metric("acc", "Accuracy", "higher", ".2f", help="Share of right answers.")
LOSS = Metric("loss", "Loss", "lower", ".1f")
CLAIMS = (
    Claim(text="New beats old", metric="acc", winner="new", loser="old", primary=True, paper="70.5 against 69.8"),
    Claim(text="Old has the lower loss", metric="loss", winner="old", loser="new", worth=1.0),
    Claim(text="New beats old by a mile", metric="acc", winner="new", loser="old", margin=0.1),
)
CURVE = Chart(title="Loss", x="step", y="loss", x_label="Step")
# accuracy and loss by arm, then seed: claims supported, undecided, refuted
SCORES = {
    "new": [(0.90, 2.0), (0.92, 3.0), (0.94, 1.0)],
    "old": [(0.85, 1.0), (0.86, 4.0), (0.88, 1.5)],
}


def make_run(
    folder, scores=SCORES, *, arms=ARMS, metrics=(ACCURACY, LOSS), claims=CLAIMS, charts=(CURVE,), steps=3, **run
):
    experiment = Experiment(
        slug="demo",
        title="A title",
        question="A question?",
        presets={},
        arms=lambda c: arms,
        claims=lambda c: claims,
        metrics=lambda c: metrics,
        job=dict,
        charts=charts,
        reading="Read so.",
    )
    seeds = list(range(max(map(len, scores.values()))))
    described = experiment.describe(None) | {"preset": "smoke", "config": {"lr": 0.1, "model": {"width": 8}}}
    about = {"plan": {"looks": [len(seeds)]}, "versions": {"torch": "2"}, "hardware": "a machine", "seeds": seeds}
    write_run(folder, described | about | run)
    for arm, values in scores.items():
        for seed, value in enumerate(values):
            if value is None:
                continue
            rows = [{"step": step, "loss": value[-1] / step} for step in range(1, steps + 1)]
            names = [metric.name for metric in metrics]
            found = dict(zip(names, value, strict=True))
            result = JobResult(arm, seed, found, False, rows, {}, 1e9, 90.0, 2**30, 1, {"torch": "2.1"}, "2 cores")
            write_job(folder, result)
    return folder


def printed(report, width=100):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(to_terminal(report))
    return capture.get()


def specs(page):
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def data(spec):
    """Every row that a specification draws."""
    return [row for part in (spec, *spec["layer"]) for row in part.get("data", {}).get("values", [])]


def test_verdicts_add_up_to_the_headline(tmp_path):
    report = load(make_run(tmp_path))
    assert [judgement.verdict for judgement in report.judgements] == ["supported", "undecided", "refuted"]
    assert report.headline == "1 of 3 claims supported, 1 refuted, 1 undecided"
    assert report.progress == "6 of 6 jobs finished"


def test_writing_leaves_both_files_and_returns_the_page(tmp_path):
    page = write(make_run(tmp_path))
    assert page == tmp_path / "report.html"
    assert (tmp_path / "report.md").read_text().startswith("# A title")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "new", "old", "report.html", "report.md"}


@pytest.mark.parametrize("render", [to_html, to_markdown, printed])
def test_every_output_shows_arms_verdicts_and_the_papers_figure(tmp_path, render):
    text = re.sub(r"\s+", " ", render(load(make_run(tmp_path))))
    for expected in (
        "new",
        "old",
        "supported",
        "refuted",
        "undecided",
        "70.5 against 69.8",
        "0.92",
        "New beats old: holds here",
        "Use new here.",
    ):
        assert expected in text


def test_markdown_table_marks_the_best_mean_and_the_spread(tmp_path):
    lines = to_markdown(load(make_run(tmp_path))).splitlines()
    start = lines.index("| Arm | Seeds | Accuracy\u00a0↑ | Loss\u00a0↓ |")
    assert lines[start + 1 : start + 4] == [
        "| --- | ---: | ---: | ---: |",
        "| **new** the technique | 3 | **0.92** ±0.02 | 2.0 ±1.0 |",
        "| **old** the baseline | 3 | 0.86 ±0.02 | 2.2 ±1.6 |",
    ]


def test_markdown_cells_cannot_break_their_table(tmp_path):
    text = to_markdown(load(make_run(tmp_path, arms=(Arm("new", "a | b\n<b>"), ARMS[1]))))
    assert "| **new** a \\| b &lt;b> | 3 |" in text


def test_the_page_fetches_nothing(tmp_path):
    fetched = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attrs):
            fetched.extend(value for name, value in attrs if name in ("src", "href", "srcset", "data", "action"))
            fetched.extend([tag] if tag in ("link", "iframe", "img", "object", "base") else [])

    page = to_html(load(make_run(tmp_path)))
    Finder().feed(page)
    assert fetched == []
    assert not re.search(r"url\(|@import", page.split("</style>")[0])
    assert "default-src 'none'" in page


def test_the_page_holds_the_plotting_script_once_and_all_plots(tmp_path):
    page = to_html(load(make_run(tmp_path)))
    assert page.count("window.vegaEmbed") == 1
    assert len(specs(page)) == 3 + 2 + 1  # claims, metrics, charts


def test_markup_in_names_is_only_text(tmp_path):
    evil = "<script>alert(1)</script>"
    arms = (Arm("new", evil), ARMS[1])
    claims = (replace(CLAIMS[0], text=evil, paper=evil),)
    folder = make_run(
        tmp_path, arms=arms, claims=claims, charts=(replace(CURVE, title=evil, x_label=evil),), title=evil
    )
    assert "<script>alert" not in to_html(load(folder))
    assert "<script>" not in to_markdown(load(folder))


def test_rich_markup_in_names_is_only_text(tmp_path):
    assert "[bold]loud" in printed(load(make_run(tmp_path, claims=(replace(CLAIMS[0], text="[bold]loud"),))))


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_fits_with_many_arms_and_metrics_and_cuts_no_number(tmp_path, width):
    arms = tuple(Arm(f"arm-number-{index}", "") for index in range(8))
    metrics = tuple(Metric(f"m{index}", f"A metric with a long name {index}", "lower", ".5f") for index in range(9))
    scores = {
        arm.name: [tuple(seed + 100.125 * row + column for column in range(9)) for seed in range(3)]
        for row, arm in enumerate(arms)
    }
    text = printed(load(make_run(tmp_path, scores, arms=arms, metrics=metrics, claims=(), charts=())), width)
    assert max(map(len, text.splitlines())) <= width
    for row in range(8):
        for column in range(9):
            assert f"{1 + 100.125 * row + column:.5f}" in text


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    report = load(make_run(tmp_path, SCORES | {"old": [SCORES["old"][0], None, None]}))
    assert report.progress == "4 of 6 jobs finished; missing: old (seeds 1, 2)"
    assert {judgement.verdict for judgement in report.judgements} == {"undecided"}
    assert report.best(ACCURACY) == frozenset()
    for text in (to_html(report), to_markdown(report), printed(report)):
        assert "4 of 6 jobs finished" in text
        assert "1 of 3" in text


def test_a_run_without_any_job_still_has_a_report(tmp_path):
    report = load(make_run(tmp_path, {"new": [None] * 3}))
    assert report.progress.startswith("0 of 6 jobs finished")
    assert "a machine" in to_html(report)
    assert "a machine" in to_markdown(report)


def test_jobs_of_other_seeds_are_left_out_and_counted(tmp_path):
    report = load(make_run(tmp_path, seeds=[0, 1]))
    assert report.table["new"]["acc"].mean == pytest.approx(0.91)
    assert report.progress == "4 of 4 jobs finished; 2 more in the folder, of arms or seeds not asked for, left out"


def test_a_single_seed_has_no_spread_and_no_verdict(tmp_path):
    report = load(make_run(tmp_path, {"new": [(0.9, 1.0)], "old": [(0.8, 2.0)]}))
    text = to_markdown(report)
    assert "| **new** the technique | 1 | 0.90 | 1.0 |" in text
    assert "at least 3 seeds are needed, the plan has 1" in text
    assert "0 of 3 claims supported, 3 undecided" in text
    assert "nan" not in printed(report).lower()
    assert len(specs(to_html(report))) == 2 + 1  # no interval to draw


def test_a_diverged_seed_is_counted_out_and_never_best(tmp_path):
    report = load(make_run(tmp_path, SCORES | {"new": [(0.99, 0.1), (NAN, NAN), (0.99, 0.1)]}))
    assert report.best(ACCURACY) == frozenset()
    assert "0.99 ±0.00 (n=2)" in to_markdown(report)
    page = to_html(report)
    assert "No finite value: new (seed 1)." in page
    assert all(math.isfinite(row["x"]) for spec in specs(page) for row in data(spec))


def test_a_curve_does_not_go_on_with_the_seeds_that_survived(tmp_path):
    folder = make_run(tmp_path)
    path = job_folder(folder, "new", 1) / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    page = to_html(load(folder))
    rows = data(specs(page)[-1])
    assert [row["x"] for row in rows if row["arm"] == "new"] == [1]
    assert [row["x"] for row in rows if row["arm"] == "old"] == [1, 2, 3]
    assert "Curves that end early, with their shortest seed: new." in page


def test_an_exploding_arm_does_not_flatten_the_others(tmp_path):
    page = to_html(load(make_run(tmp_path, SCORES | {"new": [(0.1, 1e9)] * 3})))
    assert specs(page)[-1]["layer"][1]["encoding"]["y"]["scale"]["domain"][1] < 20
    assert "The vertical axis is cut" in page


def test_long_curves_are_thinned_and_keep_their_mean(tmp_path):
    rows = data(specs(to_html(load(make_run(tmp_path, steps=1000))))[-1])
    assert len(rows) == 2 * 200
    first = next(row for row in rows if row["arm"] == "new")
    assert (first["x"], first["n"]) == (1, 3)


def test_curves_show_mean_and_one_standard_deviation(tmp_path):
    rows = data(specs(to_html(load(make_run(tmp_path))))[-1])
    first = next(row for row in rows if row["arm"] == "new" and row["x"] == 1)
    assert (first["y"], first["low"], first["high"], first["n"]) == (2.0, 1.0, 3.0, 3)


def test_scatter_draws_one_dot_per_row_of_its_phase_and_arms(tmp_path):
    folder = make_run(tmp_path, charts=(replace(CURVE, kind="scatter", phase="sweep", arms=("new",), log_x=True),))
    sweep = [{"step": step, "loss": 1.0, "phase": "sweep"} for step in (0, 1, 10)]
    (job_folder(folder, "new", 0) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sweep))
    rows = data(specs(to_html(load(folder)))[-1])
    assert [(row["arm"], row["x"]) for row in rows] == [("new", 1), ("new", 10)]  # a logarithm has no zero


def test_a_chart_that_no_job_recorded_is_left_out(tmp_path):
    page = to_html(load(make_run(tmp_path, charts=(replace(CURVE, title="Speed drawn", y="speed"),))))
    assert "Speed drawn" not in page


def test_no_claims_and_no_charts_leave_a_plain_report(tmp_path):
    report = load(make_run(tmp_path, claims=(), charts=()))
    assert "No claim to judge" in report.headline
    assert "<h2>Claims</h2>" not in to_html(report)
    assert "## Claims" not in to_markdown(report)
    assert "0.92" in printed(report)


def test_a_relative_margin_is_shown_in_the_metrics_unit(tmp_path):
    claim = replace(CLAIMS[0], margin=0.1, relative=True)
    assert "more than +0.09 (10 % of old)" in to_markdown(load(make_run(tmp_path, claims=(claim,))))


def test_a_small_spread_is_not_rounded_to_nothing(tmp_path):
    scores = {"new": [(0.9, 1.0), (0.9002, 1.0), (0.9004, 1.0)], "old": [(0.1, 1.0)] * 3}
    text = to_markdown(load(make_run(tmp_path, scores, claims=())))
    assert "0.90 ±0.0002 |" in text
    assert "0.10 ±0.00 |" in text
    assert "| Accuracy" in text
    assert "Loss\u00a0↓" not in text  # the same in every job: no column, but a line among the facts
    assert "| Loss | 1 |" in text


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-0.0004, ".1%", "−0.04%"),
        (0.0004, ".2f", "0.0004"),
        (-1e-17, ".2f", "0.00"),
        (-2.5, ".1f", "−2.5"),
        (NAN, "g", "—"),
    ],
)
def test_numbers_keep_their_sign_and_are_never_rounded_away(value, spec, text):
    assert number(value, spec) == text


def test_configuration_and_cost_are_listed(tmp_path):
    text = to_markdown(load(make_run(tmp_path)))
    for line in (
        "| lr | 0.1 |",
        "| model.width | 8 |",
        "| torch | 2.1 |",
        "1 min 30 s per job on average, 9 min 0 s in total",
    ):
        assert line in text
    assert "1,024 MiB" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("change", [{"arms": [{"nom": "new"}]}, {"seeds": None}, {"claims": 3}, {"metrics": []}])
def test_a_damaged_description_is_refused(tmp_path, change):
    path = make_run(tmp_path) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=r"run\.json"):
        load(tmp_path)


def test_a_damaged_job_is_named_and_left_out(tmp_path):
    folder = make_run(tmp_path)
    (job_folder(folder, "old", 1) / "result.json").write_text('{"arm": "o')
    page = write(folder).read_text()
    assert "is damaged" in page
    assert "is missing" in page


def test_the_first_screen_says_on_what_what_and_what_to_do(tmp_path):
    task = {"name": "digits", "rows": {"train": 10, "test": 4}, "facts": {"data": "digits", "model": "mlp"}}
    report = load(make_run(tmp_path, task=task))
    first, finding, advice = words.answer(report)
    assert first == "On digits; 10 train rows, 4 test rows; model mlp; 3 seeds per arm."
    assert finding.startswith("New beats old: holds here (Accuracy: new +0.06 against old, interval")
    assert advice == "Use new here."
    page = to_html(report)
    assert page.index("Use new here.") < page.index("Primary claims") < page.index("Mechanism claims")


@pytest.mark.parametrize(
    ("scores", "claim", "advice"),
    [
        ([(0.8, 0.9)] * 3, {}, "Do not use new here."),
        ([(0.9, 0.9), (0.901, 0.9), (0.899, 0.9)], {"worth": 0.5}, "New makes no relevant difference here."),
        (
            [(0.9, 0.8), (0.7, 0.9), (0.95, 0.8)],
            {"worth": 0.05},
            "New is undecided, and no practical number of seeds would decide it: about",
        ),
        ([(math.nan, 0.8), (0.9, 0.8), (0.95, 0.8)], {}, "New is undecided: more seeds are needed."),
    ],
)
def test_advice_follows_from_the_primary_claims(tmp_path, scores, claim, advice):
    noise = (0.0, 0.001, -0.001)
    runs = {
        "new": [(new, 1.0) for new, _ in scores],
        "old": [(old + shift, 1.0) for (_, old), shift in zip(scores, noise, strict=True)],
    }
    primary = Claim(text="New beats old", metric="acc", winner="new", loser="old", primary=True, **claim)
    report = load(make_run(tmp_path, runs, claims=(primary,)))
    assert words.answer(report)[-1].startswith(advice)


@pytest.mark.parametrize(
    ("claim", "tested"),
    [
        ({}, 'against "there is no difference", corrected'),
        ({"margin": 0.1}, 'against "the difference is just what is needed", corrected'),
        ({"worth": 0.5}, 'against "there is no difference" or "there is a relevant effect", whichever is smaller'),
    ],
)
def test_a_p_value_says_what_it_speaks_against(tmp_path, claim, tested):
    runs = {"new": [(0.9, 1.0), (0.901, 1.0), (0.899, 1.0)], "old": [(0.9, 1.0), (0.902, 1.0), (0.9, 1.0)]}
    primary = Claim(text="New beats old", metric="acc", winner="new", loser="old", primary=True, **claim)
    report = load(make_run(tmp_path, runs, claims=(primary,)))
    assert tested in words.evidence(report, report.judgements[0])["p-value"]


ADVICE = {
    ("supported", "no relevant effect"): "Use new here: it is better than",
    ("supported", "refuted"): "Whether to use new here depends on what counts: it is better than",
    ("refuted", "no relevant effect"): "Do not use new here: it is not better than",
    ("refuted", "undecided"): "Do not use new here: it is not better than",
    ("refuted", "not run"): "Do not use new here: it is not better than",
}


@pytest.mark.parametrize("pair", list(itertools.product(words.SYMBOLS, repeat=2)))
def test_two_verdicts_about_one_arm_are_one_piece_of_advice(tmp_path, pair):
    report = load(make_run(tmp_path))
    first = next(one for one in report.judgements if one.claim.winner == "new")
    judgements = [dataclasses.replace(first, verdict=verdict) for verdict in pair]
    report = dataclasses.replace(report, judgements=judgements)
    for one in judgements:
        assert one.claim.winner == "new"
    said = words.advice(report)
    assert said.lower().count("new") == 1
    assert ";" not in said
    if pair[0] != pair[1]:
        expected = ADVICE.get(pair) or ADVICE.get(pair[::-1]) or "Whether to use new here is undecided: it is "
        assert said.startswith(expected)


def test_sweeps_are_drawn_against_the_number_of_trials(tmp_path):
    folder = make_run(tmp_path)
    for arm, gain in (("new", 0.1), ("old", 0.0)):
        for seed in range(3):
            rows = [
                {"phase": "sweep", "trial": n, "rate": 0.1 * n, "score": 0.5, "acc": 0.5 + gain + 0.01 * seed * gain}
                for n in (1, 2, 3)
            ]
            rows.append({"phase": "swept", "at_edge": 1.0})
            job = job_folder(folder, arm, seed) / "metrics.jsonl"
            job.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = to_html(load(folder))
    assert "against the number of trials" in page
    assert "at the edge of what was tried for new, old" in page


def test_pictures_have_words_and_a_form_without_javascript(tmp_path):
    page = to_html(load(make_run(tmp_path)))
    assert page.count('role="img" aria-label="') == len(specs(page))
    assert len(re.findall(r"<noscript><svg", page)) == len(specs(page))
    assert "interval" in re.search(r'aria-label="(Accuracy[^"]*)"', page).group(1)


def test_pictures_are_exported_as_files(tmp_path):
    folder = make_run(tmp_path / "run")
    files = export_figures(folder, tmp_path / "figures", "svg")
    assert len(files) == len(specs(to_html(load(folder))))
    assert all("var(--" not in file.read_text() for file in files)
    with pytest.raises(UsageError, match="svg or png, got 'gif'"):
        export_figures(folder, tmp_path, "gif")


def test_several_runs_share_a_page_that_links_to_each(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    page = write_several(folders, tmp_path / "report.html").read_text()
    assert page.count("Use new here.") == 2
    assert 'href="one/report.html"' in page


def test_a_receipt_holds_a_run_without_curves_and_is_compared(tmp_path):
    report = load(make_run(tmp_path / "run"))
    path = tmp_path / "receipt.json"
    write_receipt(report, "weightsmith run demo", path)
    content = read_receipt(path)
    assert "rows" not in json.dumps(content["jobs"])
    assert content["claims"][0]["verdict"] == "supported"
    assert {figure.state for figure in compare(content, report, 0.0)} == {"equal"}
    content["jobs"][0]["metrics"]["acc"] += 0.1
    (found,) = [figure for figure in compare(content, report, 0.01) if figure.state != "equal"]
    assert (found.arm, found.metric, found.state, found.examples) == ("new", "acc", "beyond", None)
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"receipt\.json .*slug"):
        read_receipt(path)


RATE = Metric("rate", "Chosen rate", chosen_by=("new",))
TUNED = {"new": [(90.0, 0.01), (92.0, 0.03)], "old": [(85.0, 0.01), (86.0, 0.01)]}


def states(tmp_path, changes, **options):
    """How the metrics of the first seed compare after these changes to the receipt, by arm and metric."""
    report = load(make_run(tmp_path, TUNED, metrics=(ACCURACY, RATE), claims=CLAIMS[:1]))
    scores = {"acc": torch.tensor([100.0] * 45 + [0.0] * 5)}  # one example of 50: 2 points
    jobs = [replace(job, scores=scores) for job in report.jobs]
    content = receipt_of(report, "")
    for (arm, metric), value in changes.items():
        next(job for job in content["jobs"] if (job["arm"], job["seed"]) == (arm, 0))["metrics"][metric] = value
    figures = compare(content, replace(report, jobs=jobs), **{"tolerance": 0.0, **options})
    return {(figure.arm, figure.metric): figure for figure in figures if figure.state != "equal"}


def test_another_choice_is_accepted_only_while_the_rest_of_the_job_agrees(tmp_path):
    turned = ("new", "rate")
    assert states(tmp_path, {turned: 0.03})[turned].state == "choice"
    assert states(tmp_path, {turned: 0.03, ("new", "acc"): 88.0})[turned].state == "choice"
    worse = states(tmp_path, {turned: 0.03, ("new", "acc"): 80.0})
    assert {figure.state for figure in worse.values()} == {"beyond"}
    assert states(tmp_path, {("old", "rate"): 0.03})["old", "rate"].state == "beyond"  # nobody chose it there


def test_differences_are_counted_in_test_examples_and_in_spreads_over_seeds(tmp_path):
    (one,) = states(tmp_path, {("new", "acc"): 88.0}).values()
    assert (one.state, one.examples) == ("within", 1.0)
    (two,) = states(tmp_path, {("new", "acc"): 86.0}).values()
    assert (two.state, two.examples) == ("beyond", 2.0)
    assert two.spreads == pytest.approx(4 / (6 / math.sqrt(2)))
    (two,) = states(tmp_path, {("new", "acc"): 86.0}, spread=1.0).values()
    assert two.state == "within"
    (gone,) = states(tmp_path, {("new", "lost metric"): 1.0}, tolerance=9.0, spread=9.0).values()
    assert gone.state == "beyond"


def test_costs_are_not_compared_and_failures_are_told_by_arm(tmp_path):
    seconds = Metric("ms", "Milliseconds", "lower", cost=True)
    failed = Metric("broken", "Broken", failures=True)
    scores = {"new": [(0.9, 1.0, 2.0), (0.8, 1.0, 1.0)], "old": [(0.7, 1.0, 0.0), (0.6, 1.0, 0.0)]}
    report = load(make_run(tmp_path, scores, metrics=(ACCURACY, seconds, failed), claims=CLAIMS[:1]))
    assert {figure.metric for figure in compare(receipt_of(report, ""), report, 0.0)} == {"acc", "broken"}
    assert "Failed networks, left out of the means of their arms: new (3)." in words.notices(report)


def test_show_prints_where_there_is_no_notebook(tmp_path, capsys):
    show(make_run(tmp_path))
    assert "Use new here." in capsys.readouterr().out


@pytest.mark.parametrize(("margin", "met"), [(0.01, True), (0.5, False)])
def test_a_gate_that_is_not_met_is_the_first_thing_said(tmp_path, margin, met):
    gate = Claim(text="New has learned", metric="acc", winner="new", loser="old", gate=True, margin=margin)
    report = load(make_run(tmp_path, claims=(*CLAIMS, gate)))
    assert [one.claim.text for one in report.gates] == ["New has learned"]
    assert bool(report.closed) != met
    assert ("supported" in {one.verdict for one in report.primary}) == met
    for text in (printed(report, 200), to_markdown(report), to_html(report)):
        assert ("Gate not met, so no other claim is judged. New has learned" in text) != met
        assert ("Nothing is decided here" in text) != met
    assert "of 3 claims supported" in report.headline


def test_kept_pictures_are_embedded_with_words_for_them(tmp_path):
    make_run(tmp_path)
    for order, arm in enumerate(("new", "old")):
        for seed in (1, 2):
            image = torch.full((1, 3, 4, 5), 0.1 * seed)
            keep_gallery(job_folder(tmp_path, arm, seed), [Picture.of(image, "<Rain>", f"by {arm}", order)])
    page = to_html(load(tmp_path))
    assert page.count("data:image/png;base64,") == 2  # of the first seed that has any
    assert 'alt="&lt;Rain&gt;: by new"' in page
    assert page.index("by new") < page.index("by old")
    (job_folder(tmp_path, "new", 1) / "gallery.json").write_text(
        '{"pictures": [{"group": "a", "caption": "b", "order": 1, "png": "PHN2Zz4="}]}'
    )
    report = load(tmp_path)
    assert "no PNG" in report.damaged[0]
    assert list(report.gallery) == ["<Rain>"]
