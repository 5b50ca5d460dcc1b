"""Every ordered pair of verbs on one small model: does the second compose with the first, or is it refused?

    python tests/contract/compositions.py

writes what it finds into docs/composes.md; `test_compositions.py` fails if page and result differ.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from verbs import VERBS, Make, a_little, build, outputs, sgd, short, train

from weightsmith.core.errors import UsageError
from weightsmith.quantize import load_quantized, save_quantized

PAGE = Path(__file__).parents[2] / "docs" / "composes.md"
BEGIN, END = "<!-- matrix: written by `make tables` -->", "<!-- /matrix -->"

COMPOSES, UNPACKED, REFUSED, FOREIGN, NOT_OURS, BROKEN = "yes", "unpacked", "refused", "theirs", "–", "broken"


class Broken(AssertionError):
    """A pair that goes through and then does something else than it says."""


def _apply(model: nn.Module, verb: str, history: list[str]) -> nn.Module:
    if verb != "save and load":
        return VERBS[verb].apply(model)
    return _through_a_file(model, history)


def _through_a_file(model: nn.Module, history: list[str]) -> nn.Module:
    fresh = build()
    for position, verb in enumerate(history):
        fresh = _apply(fresh, verb, history[:position])
        train(fresh, _optimizer(history))  # a state that comes back from the file, not from here
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        fresh.load_state_dict(torch.load(file.name, weights_only=True))
    return fresh


def _optimizer(history: list[str]) -> Make:
    return next((made for verb in reversed(history) if (made := VERBS[verb].optimizer)), sgd)


def _state(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, Tensor]]:
    classes = [(name, type(module)) for name, module in model.named_modules()]
    return classes, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(left: Tensor, right: Tensor, distance: float = 1e-5) -> bool:
    return torch.allclose(left, right, atol=distance, rtol=distance)


def _distance(left: Tensor, right: Tensor) -> str:
    return f"{float((left - right).abs().max()):.2g}"


def outcome(first: str, then: str) -> str:
    """Do ``first``, train, do ``then``, train, save and load in every way.

    Raises:
        Broken: Something was lost, left out or changed without a word.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _outcome(first, then)


def _outcome(first: str, then: str) -> str:
    if not (VERBS[first].ours or VERBS[then].ours):
        return NOT_OURS
    model = VERBS[first].apply(build())
    train(model, _optimizer([first]))
    before, state = outputs(model), _state(model)
    verb = VERBS[then]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = _apply(model, then, [first])
        after = outputs(model)
    except Exception as error:
        if not verb.ours:
            return FOREIGN
        if not isinstance(error, UsageError | TypeError):
            raise Broken(f"refused with a raw {type(error).__name__}: {error}") from error
        classes, tensors = _state(model)
        if classes != state[0] or tensors.keys() != state[1].keys() or not _same(outputs(model), before, 0.0):
            raise Broken(f"refused after the model was changed: {error}") from error
        return REFUSED
    if verb.moves is not None and not _same(after, before, verb.moves):
        raise Broken(f"outputs moved by {_distance(after, before)} when it was applied")
    alone, touched = (
        {short(name) for name in verb.touched(m)} for m in (verb.apply(build()) if verb.ours else model, model)
    )
    if touched != alone and not said:
        raise Broken(f"acts on {sorted(touched)}, alone on {sorted(alone)}, and says nothing")

    history = [first, then]
    quantized = any(VERBS[name].quantizes for name in history)
    saved = _packs(model, then) if quantized and verb.quantizes and then != "prepare_ofq_" else True
    if quantized and then != "prepare_ofq_":
        train(model, a_little)
        _packs(model, "a little training")
    progress = train(model, _optimizer(history))
    trained = outputs(model)
    resumed = _through_a_file(model, history)
    if not _same(outputs(resumed), trained):
        raise Broken(f"a state dict comes back {_distance(outputs(resumed), trained)} away")
    for one in (model, resumed):
        train(one, _optimizer(history), progress)
    trained = outputs(model)
    if not _same(outputs(resumed), trained):
        raise Broken(f"training resumes {_distance(outputs(resumed), trained)} away")
    return COMPOSES if _finishes(model, history, trained) and saved else UNPACKED


def _finishes(model: nn.Module, history: list[str], trained: Tensor) -> bool:
    backwards = history[::-1]
    early = [name for name in backwards if VERBS[name].early]
    for name in early + [name for name in backwards if not VERBS[name].early]:
        try:
            model = VERBS[name].finish(model)
        except Exception as error:
            raise Broken(f"{name} cannot be finished: {error}") from error
    finished = outputs(model)
    # what was beside a layer, such as an adapter, has its input quantized along with it once it is inside
    if not _same(finished, trained, 1e-4 if all(VERBS[name].plain for name in history) else 0.12):
        raise Broken(f"outputs moved by {_distance(finished, trained)} when it was finished")
    saved = _packs(model, "finishing") if "prepare_ofq_" in history else True
    if not all(VERBS[name].plain for name in history):
        return saved
    plain = build()
    if model.state_dict().keys() != plain.state_dict().keys():
        raise Broken(f"keys differ in {sorted(model.state_dict().keys() ^ plain.state_dict().keys())}")
    if {n for n, _ in model.named_parameters()} != {n for n, _ in plain.named_parameters()}:
        raise Broken("parameters have become buffers")
    plain.load_state_dict(model.state_dict())
    if not _same(outputs(plain), finished):
        raise Broken(f"the plain model comes back {_distance(outputs(plain), finished)} away")
    return saved


def _packs(model: nn.Module, when: str) -> bool:
    """Whether the integers can be saved; if so, they come back as what they were."""
    expected = outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_quantized(model, Path(folder, "q"))
        except UsageError:
            return False
        try:
            loaded = load_quantized(Path(folder, "q"), build())
        except UsageError as error:
            raise Broken(f"saved after {when}, and cannot be loaded: {error}") from error
    if not _same(outputs(loaded), expected):
        raise Broken(f"saved after {when}, and comes back {_distance(outputs(loaded), expected)} away")
    return True


def matrix(cells: dict[tuple[str, str], str]) -> str:
    """The outcomes as Markdown: a row is what comes first."""
    lines = ["| first ↓ then → | " + " | ".join(f"`{v}`" for v in VERBS) + " |", "|---" * (len(VERBS) + 1) + "|"]
    lines += [f"| `{a}` | " + " | ".join(cells[a, b] for b in VERBS) + " |" for a in VERBS]
    return "\n".join(lines)


def read() -> dict[tuple[str, str], str]:
    """The outcomes that the page tells."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0].strip("`"), b.strip("`")): c for row in rows[2:] for b, c in zip(rows[0][1:], row[1:], strict=True)}


def main() -> None:
    """Write the page's table; exit with 1 if a pair is broken."""
    torch.set_num_threads(1)
    cells, broken = {}, []
    for pair in [(a, b) for a in VERBS for b in VERBS]:
        try:
            cells[pair] = outcome(*pair)
        except Exception as error:
            cells[pair] = BROKEN
            broken.append(f"{pair[0]}, then {pair[1]}: {type(error).__name__}: {error}")
    text = PAGE.read_text()
    PAGE.write_text(f"{text.partition(BEGIN)[0]}{BEGIN}\n{matrix(cells)}\n{END}{text.partition(END)[2]}")
    sys.exit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
