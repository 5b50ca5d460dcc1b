"""Any training as an experiment: a function of the user's with techniques put on it, or commands in any language.

A training function takes a `weightsmith.lab.trial.Trial` and returns numbers. A command prints JSON lines, or
writes them to the file that ``$WEIGHTSMITH_RESULT`` names; the last value of the metric counts.
"""

import contextlib
import inspect
import itertools
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_module, load_object
from weightsmith.core.own_code import code_digest
from weightsmith.lab.commands import run_command
from weightsmith.lab.experiment import Arm, Better, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.fingerprint import files_digest
from weightsmith.lab.job import Job
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.trial import Recipe, Trial

BASELINE = "baseline"
_LOWER = ("loss", "error", "perplexity", "ppl", "nll", "mse", "rmse", "mae", "wer", "cer", "fid", "time", "seconds")
_HIGHER = ("acc", "f1", "score", "auc", "bleu", "rouge", "precision", "recall", "reward", "iou", "map", "r2", "psnr")
_CODE = {".py", ".sh", ".bash", ".r", ".R", ".jl", ".js", ".ts", ".lua", ".m", ".pl", ".rb", ".yaml", ".yml", ".toml"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_PLAIN_WORD = re.compile(r"[\w./+-]+")
_PLACE = re.compile(r"\{(seed|folder|[A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, and by what.

    Attributes:
        what: ``module:function`` or ``file.py:function``; ``""`` when arms are commands.
        arms: Name of each arm and its techniques joined by ``+``, or its command; the first is the baseline.
        metric: Key of the number that decides.
        better: Which direction is good.
        worth: Smallest difference worth having; ``None``: any.
        sweep: Hyperparameters and their values, every arm is tried at all combinations.
        choose_by: Key of the number that chooses among them.
        choose_better: Which direction of that is good.
        time_limit: Seconds that a command may take.
    """

    what: str
    arms: tuple[tuple[str, str], ...]
    metric: str
    better: Better
    worth: float | None = None
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = ()
    choose_by: str = ""
    choose_better: Better = "higher"
    time_limit: float | None = None


def direction(metric: str) -> tuple[str, Better]:
    """Split ``"val_loss:lower"``, or tell from the name which direction is good.

    Raises:
        UsageError: The name does not tell.
    """
    name, colon, given = metric.partition(":")
    if colon:
        if given not in ("higher", "lower"):
            raise UsageError(f"metric must end in :higher or :lower, got {metric!r}")
        return name, "higher" if given == "higher" else "lower"
    words = re.split(r"[^a-z0-9]+", name.lower())
    if any(word in _LOWER for word in words):
        return name, "lower"
    if any(word.startswith(_HIGHER) for word in words):
        return name, "higher"
    raise UsageError(f"metric {name!r} does not tell which direction is good: write {name}:higher or {name}:lower")


def compare_function(
    what: str, comparison: Comparison, recipe: Callable[[str], Sequence[Recipe]]
) -> Experiment[Comparison]:
    """Compare a training function with itself under techniques.

    Args:
        what: ``module:function`` or ``file.py:function``, called with a trial.
        comparison: With ``arms`` as names of techniques; ``""`` is the training as it is.
        recipe: ``name -> recipes``, fresh ones at every call; importable.

    Raises:
        UsageError: The function is not there or takes no trial, a technique is not known or does not combine.
    """
    function = load_object(what, "compare")
    if not callable(function):
        raise UsageError(f"compare {what!r} must name a function that takes a trial")
    for _, techniques in comparison.arms:
        recipe(techniques)
    _check_takes_a_trial(what, function)
    where = what.rpartition(":")[0]
    code = code_digest(load_module(where, "compare"))
    texts = {name: _texts(recipe(techniques)) for name, techniques in comparison.arms}
    return _experiment(what.rpartition(":")[2], comparison, texts, _FunctionJob(recipe), code)


def _check_takes_a_trial(what: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # functions of C need not have one
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise UsageError(f"compare {what!r} is called with a trial only, and takes {signature}: {error}") from error


def compare_commands(comparison: Comparison, *, here: bool = True) -> Experiment[Comparison]:
    """Compare commands; ``{seed}`` and ``{folder}``, and swept values by name, are put in.

    Args:
        comparison: With ``arms`` as commands.
        here: The commands run on this machine, so their programs must be there.

    Raises:
        UsageError: A command does not use the seed or a swept value, uses an unknown placeholder, or its program is
            not there.
    """
    swept = [name for name, _ in comparison.sweep]
    for name in {"seed", "folder"}.intersection(swept):
        raise UsageError(f"--sweep {name}: {{{name}}} is set for each job; give the swept value another name")
    known = {"seed", "folder", *swept}
    files = set()
    for name, command in comparison.arms:
        found = set(_PLACE.findall(command))
        if found - known:
            raise UsageError(
                f"arm {name!r}: unknown placeholder {{{sorted(found - known)[0]}}}; known: {sorted(known)}"
            )
        if "seed" not in found and "WEIGHTSMITH_SEED" not in command:
            raise UsageError(
                f"arm {name!r}: the command must use {{seed}} (or $WEIGHTSMITH_SEED), else all seeds are the same run"
            )
        for unused in (value for value in swept if value not in found):
            raise UsageError(
                f"--sweep {unused}: the command of arm {name!r} must use {{{unused}}}, else all values are the same run"
            )
        if here and (program := _program(command)) and not _exists(program):
            raise UsageError(f"arm {name!r}: there is no program {program!r} that can be run from here: {command}")
        with contextlib.suppress(ValueError):
            files |= {
                Path(word) for word in shlex.split(command) if Path(word).suffix in _CODE and Path(word).is_file()
            }
    texts = {name: ("", command) for name, command in comparison.arms}
    return _experiment("commands", comparison, texts, _command_job, files_digest(files))


def _program(command: str) -> str:
    """The program that a command line starts; ``""`` where only the shell could tell."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    word = next((word for word in words if word.startswith("PATH=") or not _ASSIGNMENT.match(word)), "")
    return word if _PLAIN_WORD.fullmatch(word) else ""


def _exists(program: str) -> bool:
    if shutil.which(program):
        return True
    # what the shell itself knows: built-in commands and words such as "if"
    return subprocess.run(["sh", "-c", 'command -v -- "$1"', "sh", program], capture_output=True).returncode == 0


def _texts(recipes: Sequence[Recipe]) -> tuple[str, str]:
    if not recipes:
        return "baseline", "the training as it is"
    return " + ".join(recipe.title for recipe in recipes), "; ".join(recipe.text for recipe in recipes)


def _experiment(
    name: str,
    comparison: Comparison,
    texts: Mapping[str, tuple[str, str]],
    job: Callable[[Comparison, Job], Mapping[str, Value]],
    code: str,
) -> Experiment[Comparison]:
    metric, (baseline, *others) = comparison.metric, comparison.arms
    arms = [Arm(arm, texts[arm][1], texts[arm][0]) for arm, _ in comparison.arms]
    labels = {arm.name: arm.label for arm in arms}
    claims = [
        Claim(
            text=f"{labels[arm]} beats {labels[baseline[0]]}",
            metric=metric,
            winner=arm,
            loser=baseline[0],
            primary=True,
            worth=comparison.worth,
        )
        for arm, _ in others
    ]
    charts = [
        Chart(title=metric.replace("_", " "), x=x, y=metric, phase="training", x_label=x) for x in ("epoch", "step")
    ]
    title = " · ".join(labels[arm] for arm, _ in others) or labels[baseline[0]]
    if comparison.what:
        title += f" on {comparison.what}"
    elif others:
        title += f" against {labels[baseline[0]]}"
    chosen = ""
    if comparison.sweep:
        trials = math.prod(len(values) for _, values in comparison.sweep)
        chosen = f" Every arm is tried {trials} times per seed, at the same values; {comparison.choose_by} chooses."
        if comparison.choose_by == metric:
            chosen += " It is chosen by the same number that is compared, so all arms look better than they are."
    return Experiment(
        slug=f"compare-{name}",
        title=title,
        question=f"Does it help this training, judged by {metric}?",
        presets={"laptop": comparison},
        arms=lambda _: arms,
        claims=lambda _: claims,
        metrics=lambda _: (Metric(metric, metric.replace("_", " "), comparison.better, ".4g"),),
        charts=tuple(charts),
        job=job,
        reading=f"The seed is what differs between runs of an arm; the arms share it.{chosen}",
        code=code,
    )


@dataclass(frozen=True, slots=True)
class _FunctionJob:
    """Call the training function once per combination of swept values, and keep the best."""

    recipe: Callable[[str], Sequence[Recipe]]

    def __call__(self, comparison: Comparison, job: Job) -> Mapping[str, Value]:
        function = load_object(comparison.what, "compare")
        techniques = dict(comparison.arms)[job.arm]

        def attempt(values: Mapping[str, str], folder: Path) -> Mapping[str, Any]:
            def record(row: Mapping[str, float]) -> None:
                job.record(row, phase="training", **values)

            trial = Trial(job.seed, recipes=self.recipe(techniques), values=values, folder=folder, record=record)
            seed_everything(job.seed)
            returned = function(trial)
            trial.check()
            if not isinstance(returned, Mapping):
                raise UsageError(
                    f"{comparison.what} must return a dictionary of numbers, got {type(returned).__name__}"
                )
            return returned

        return _best(comparison, job, attempt)


def _command_job(comparison: Comparison, job: Job) -> Mapping[str, Value]:
    """Run the arm's command once per combination of swept values, and keep the best."""
    command = dict(comparison.arms)[job.arm]

    def attempt(values: Mapping[str, str], folder: Path) -> Mapping[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        known = {"seed": str(job.seed), "folder": str(folder.resolve()), **values}
        filled = _PLACE.sub(lambda match: known[match[1]], command)
        return run_command(filled, job, values, folder, comparison.time_limit)

    return _best(comparison, job, attempt)


def _best(
    comparison: Comparison, job: Job, attempt: Callable[[Mapping[str, str], Path], Mapping[str, Any]]
) -> Mapping[str, Value]:
    names = [name for name, _ in comparison.sweep]
    sign = 1.0 if comparison.choose_better == "higher" else -1.0
    best, kept = -math.inf, None
    for number, values in enumerate(itertools.product(*(values for _, values in comparison.sweep))):
        chosen = dict(zip(names, values, strict=True))
        returned = attempt(chosen, job.folder / f"trial-{number}")
        for key in {comparison.metric, comparison.choose_by or comparison.metric}:
            if key not in returned:
                raise UsageError(f"{key!r} is not among the results: {', '.join(map(str, returned)) or 'none'}")
        score = sign * _number(returned[comparison.choose_by or comparison.metric])
        if kept is None or (math.isfinite(score) and score > best):
            best, kept = (score if math.isfinite(score) else best), returned[comparison.metric]
        if comparison.sweep:
            row: dict[str, float | str] = dict(chosen)
            row |= {"trial": number + 1, "score": sign * score, comparison.metric: _number(kept)}
            job.record(row, phase="sweep")
        for key, value in returned.items():
            if isinstance(value, int | float):
                job.record({str(key): value}, phase="result")
    found = kept if isinstance(kept, Tensor) else _number(kept)
    job.diverged = job.diverged or not math.isfinite(_number(found))
    return {comparison.metric: found}


def _number(value: Any) -> float:
    try:
        return float(value.double().mean()) if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a result must be a number, got {value!r}") from error
