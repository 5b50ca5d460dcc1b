"""The command line: ``weightsmith techniques | show | run | report``, and jobs on model files such as ``merge``.

Exit codes: 0 it ran, whatever the verdict; 1 it failed; 2 it was asked for something that does not exist.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from weightsmith.core.display import markup
from weightsmith.core.errors import MissingExtra, UsageError, unknown
from weightsmith.techniques import TECHNIQUES, Technique, technique

if TYPE_CHECKING:
    from weightsmith.lab.claim import Experiment
    from weightsmith.lab.run import Engine, Run

Slug = tyro.conf.Positional[str]
_TOOLS = {
    "merge": "Merge the checkpoints of one training run, weighted by what the run has logged.",
    "quantize": "Quantise a Hugging Face model folder, block by block, into integer weights that load elsewhere.",
}
_console = Console()
_errors = Console(stderr=True)


def techniques() -> int:
    """List the fifteen techniques, one line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for card in TECHNIQUES:
        table.add_row("[green]●[/]" if card.available else "[dim]○[/]", f"[bold]{card.slug}[/]", card.purpose)
    _console.print(table)
    _console.print("\n● available  ○ announced, not in this version yet", style="dim")
    _console.print("weightsmith show NAME tells more; weightsmith run NAME finds out whether it helps", style="dim")
    return 0


def show(slug: Slug, /) -> int:
    """Show a technique's card: what it is, when to use it, how, the paper's claim, what was measured.

    Args:
        slug: A name from `weightsmith techniques`.
    """
    card = technique(slug)
    body = Path(__file__).parent / "cards" / f"{slug}.md"
    if body.is_file():
        _console.print(Markdown(body.read_text("utf-8"), hyperlinks=False))
    else:
        _console.print(Markdown(f"# {card.title}\n\n{card.purpose}.\n\n*Announced: not in this version yet.*"))
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("claim", card.claim)
    facts.add_row("paper", f"{card.paper}. {card.venue} {card.year}, arXiv {card.arxiv}")
    facts.add_row("official code", card.code or "none published")
    if card.available:
        facts.add_row("names", "\n".join(card.names))
        facts.add_row("try it", f"weightsmith run {card.slug}")
    _console.print()
    _console.print(facts)
    return 0


def report(run_dir: tyro.conf.Positional[Path], /) -> int:
    """Rebuild the report of a run folder and print its tables.

    Args:
        run_dir: A folder that `weightsmith run` made, for example runs/adamp/0123456789ab.
    """
    from weightsmith.lab import report as reports

    page = reports.write(run_dir)
    _console.print(reports.to_terminal(reports.load(run_dir)))
    _console.print(f"\nReport: {markup(page.resolve())}", soft_wrap=True, highlight=False)
    return 0


def _run_command(experiment: "Experiment[Any]", preset: str) -> Callable[..., int]:
    """Build the ``run`` command of one experiment, with its configuration's fields as options."""
    default = experiment.preset(preset)

    def run(
        slug: Slug,
        /,
        config: tyro.conf.OmitArgPrefixes[tyro.conf.FlagConversionOff[type(default)]] = default,  # type: ignore[valid-type]
        preset: Annotated[str, tyro.conf.arg(metavar="|".join(experiment.presets))] = preset,
        seeds: int = 3,
        arms: tuple[str, ...] = (),
        out: Path = Path("runs"),
        engine: Literal["local", "ray"] = "local",
        address: str | None = None,
        workers: int | None = None,
        data_dir: Path | None = None,
        tracker: str | None = None,
        set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    ) -> int:
        """Find out whether a technique helps: run its experiment, judge its claims, write a report.

        Args:
            slug: A name from `weightsmith techniques`.
            config: The configuration that the preset sets; every field can be overridden.
            preset: Which configuration to start from: smoke (seconds), laptop (minutes), paper (the paper's setting).
            seeds: How many seeds; fewer than 3 decide nothing.
            arms: Run these arms only, and judge the claims about them.
            out: Parent of the run folders. What is finished there is not run again.
            engine: Local processes, or a Ray cluster.
            address: Address of the Ray cluster; a cluster on this machine is started when none is given.
            workers: Jobs at a time; one per core by default.
            data_dir: Folder that holds data sets by name, in the hub's layout (or set WEIGHTSMITH_DATA).
            tracker: Also log to an experiment tracker that Accelerate knows: tensorboard, wandb, mlflow ...
            set: key=value, the same as --key value; may be given several times.
        """
        if data_dir is not None:
            os.environ["WEIGHTSMITH_DATA"] = str(data_dir.resolve())
        return _run(experiment, config, preset, seeds, arms, out, engine, address, workers, tracker)

    return run


def _run_help(slug: Slug, /) -> int:
    """Find out whether a technique helps: run its experiment, judge its claims, write a report.

    `weightsmith run NAME --help` lists the options and the fields of that experiment's configuration.

    Args:
        slug: A name from `weightsmith techniques`.
    """
    raise _not_available(technique(slug))


def _not_available(card: Technique) -> UsageError:
    available = ", ".join(card.slug for card in TECHNIQUES if card.available)
    return UsageError(f"{card.slug} is announced but not in this version yet; available: {available}")


def _run(
    experiment: "Experiment[Any]",
    config: Any,
    preset: str,
    seeds: int,
    arms: tuple[str, ...],
    out: Path,
    engine: "Engine",
    address: str | None,
    workers: int | None,
    tracker: str | None,
) -> int:
    from weightsmith.lab import report as reports
    from weightsmith.lab.run import run
    from weightsmith.lab.track import check_tracker, track

    if tracker is not None:
        check_tracker(tracker)
    # a worker that has grown is replaced between jobs; that concerns nobody
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
    started = time.perf_counter()
    result = run(
        experiment,
        config,
        preset=preset,
        seeds=seeds,
        arms=arms,
        out=out,
        engine=engine,
        address=address,
        workers=workers,
        watch=_progress,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return 1 if result.failures else 0
    if tracker is not None:
        track(result, tracker)
    if result.finished or result.skipped:
        page = reports.write(result.folder)
        _console.print(reports.to_terminal(reports.load(result.folder)))
        done = f"{len(result.finished)} jobs run, {len(result.skipped)} reused, {time.perf_counter() - started:.0f} s"
        _console.print(f"\n{done}\nReport: {markup(page.resolve())}", soft_wrap=True, highlight=False)
    for failure in result.failures:
        trace = result.folder / failure.arm / f"seed-{failure.seed}.error.txt"
        _complain(f"{failure.arm}, seed {failure.seed} failed: {failure.error}\n  traceback: {trace}")
    return 1 if result.failures else 0


@contextlib.contextmanager
def _progress(result: "Run", live: Path | None, total: int) -> Iterator[Callable[[], None]]:
    """Bars while jobs run: the whole on top, and a line for what each worker is at."""
    from weightsmith.lab.progress import watching

    with watching(_console, result, live, total) as step:
        yield step


def _tool(name: str, *, chosen: bool) -> Callable[..., int]:
    if chosen:
        return getattr(importlib.import_module(f"weightsmith.tools.{name}"), name)

    def listed() -> int:  # what it really takes is imported when it is asked for
        raise NotImplementedError(name)

    listed.__doc__ = _TOOLS[name]
    return listed


def _experiment(slug: str) -> "Experiment[Any]":
    card = technique(slug)
    if card.experiment is None:
        raise _not_available(card)
    return importlib.import_module(card.experiment).EXPERIMENT


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


def _preset(arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
    return "laptop"


def _complain(message: str) -> None:
    lines = "\n".join(map(markup, message.split("\n")))
    _errors.print(f"[bold red]error:[/] {lines}", highlight=False, soft_wrap=True)


def _dispatch(arguments: list[str]) -> int:
    command: Callable[..., int] = _run_help
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        experiment, preset = _experiment(arguments[1]), _preset(arguments)
        command = _run_command(experiment, preset)
        arguments = _spell_out(arguments, experiment.preset(preset))
    if not arguments:
        arguments = ["--help"]
    commands: dict[str, Callable[..., int]] = {"techniques": techniques, "show": show, "run": command, "report": report}
    commands |= {name: _tool(name, chosen=arguments[0] == name) for name in _TOOLS}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments,
        prog="weightsmith",
        description="Will this trick help my model? Find out with one command, keep it with one line.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``weightsmith`` command.

    Args:
        arguments: Words after the program's name; ``None``: those of this process. ``--debug`` shows tracebacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks must not end the command
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words == ["--version"]:
        from weightsmith import __version__

        _console.print(f"weightsmith {__version__}", highlight=False)
        sys.exit(0)
    try:
        code = _dispatch(words)
    except KeyboardInterrupt:
        _complain("interrupted; what was finished is kept, the same command goes on from there")
        code = 130
    except Exception as error:
        if debug:
            raise
        _complain(str(error) if isinstance(error, UsageError | MissingExtra) else f"{type(error).__name__}: {error}")
        code = 2 if isinstance(error, UsageError) else 1
    sys.exit(code)


if __name__ == "__main__":
    main()
