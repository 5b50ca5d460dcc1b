"""Every ordered pair of verbs on one small model: does the second compose with the first, or is it refused?

    python tests/contract/compositions.py

writes what it finds into docs/composes.md; `test_compositions.py` fails if page and result differ.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from weightsmith import fold_
from weightsmith.adapt import BoneConfig, apply_bone_, unload_bone_
from weightsmith.adapt.apply import bone_layers
from weightsmith.average import ema
from weightsmith.core.errors import UsageError
from weightsmith.optim import SGDP, AdamP
from weightsmith.quantize import (
    Grid,
    calibrate_,
    finish_ofq_,
    flexround_,
    load_quantized,
    prepare_ofq_,
    quantize_activations_,
    quantized_weights,
    round_to_nearest_,
    save_quantized,
)
from weightsmith.quantize.weight_quantizer import sites as quantizers
from weightsmith.reparam import InWeightSpace, compand_
from weightsmith.reparam.apply import sites as companders

PAGE = Path(__file__).parents[2] / "docs" / "composes.md"
BEGIN, END = "<!-- matrix: written by `make tables` -->", "<!-- /matrix -->"

COMPOSES, UNPACKED, REFUSED, FOREIGN, NOT_OURS, BROKEN = "yes", "unpacked", "refused", "theirs", "–", "broken"


class Broken(AssertionError):
    """A pair that goes through and then does something else than it says."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(self.first(x)))))


BODY = ("first", "second")


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def data() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> Tensor:
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = model.eval()(data())
    for module, mode in training.items():
        module.training = mode
    return found


Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(_trainable(model), lr=0.05, momentum=0.9)


def a_little(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(_trainable(model), lr=1e-4)


def projected(cls: type[torch.optim.Optimizer]) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = cls(_trainable(model), lr=0.01, weight_decay=0.01)
        trains = {id(p) for p in _trainable(model)}
        companded = any(id(site.v) in trains for site in companders(model))
        return InWeightSpace(optimizer, model) if companded else optimizer

    return make


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, make: Make, state: dict | None = None) -> dict:
    """Three steps; the optimizer's state."""
    if not _trainable(model):
        return {}
    optimizer = make(model)
    if state:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(3):
        optimizer.zero_grad()
        (model(data()) - 1).square().mean().backward()
        optimizer.step()
    return optimizer.state_dict()


@dataclass(frozen=True)
class Verb:
    """Something that a user does to a model.

    Attributes:
        apply: Returns the model.
        finish: Makes the model plain again.
        early: Whether it has to finish before the others: what merges into a weight needs a plain one.
        moves: How far outputs may move when it is applied; ``None``: it is meant to change them.
        touched: Names of the layers that it acts on.
        optimizer: What trains the model from then on.
        ours: Whether errors are ours to word.
        plain: Whether finishing leaves the modules and keys that the user brought.
        quantizes: Whether it leaves integers to save.
    """

    apply: Callable[[nn.Module], nn.Module]
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    early: bool = False
    moves: float | None = 1e-5
    touched: Callable[[nn.Module], set[str]] = lambda _: set()
    optimizer: Make | None = None
    ours: bool = True
    plain: bool = True
    quantizes: bool = False


def _each(verb: Callable[[nn.Module], object], model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if _short(name) in BODY:
            verb(module)
    return model


def _weight_norm(model: nn.Module) -> nn.Module:
    return _each(parametrizations.weight_norm, model)


def _prune(model: nn.Module) -> nn.Module:
    return _each(lambda layer: prune.l1_unstructured(layer, "weight", amount=0.2), model)


def _unprune(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    return model


def _lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=list(BODY), init_lora_weights=True)
    return peft.get_peft_model(model, config)


def _unload(model: nn.Module) -> nn.Module:
    # PEFT leaves frozen what it has frozen
    return model.merge_and_unload().requires_grad_(True) if isinstance(model, peft.PeftModel) else model


def _ofq(model: nn.Module) -> nn.Module:
    prepared = prepare_ofq_(
        model, weight="lsq", weight_bits=8, activation_bits=8, granularity="tensor", qk_reparam=False
    )
    return calibrate_(prepared, data())


def _nearest(model: nn.Module) -> nn.Module:
    round_to_nearest_(model, grid=Grid(8))
    return model


def _flexround(model: nn.Module) -> nn.Module:
    flexround_(model, data(), Grid(8, search="minmax"), blocks="layers", iterations=3, lr=1e-3, batch_size=4)
    return model


def _bone(model: nn.Module) -> nn.Module:
    return apply_bone_(model, BoneConfig(r=2, where=["*first*", "*second*"]))


def _unbone(model: nn.Module) -> nn.Module:
    return unload_bone_(model, merge=True)


def _ema(model: nn.Module) -> nn.Module:
    averaged = ema(model, 0.5)
    for _ in range(2):
        train(model, sgd)
        averaged.update_parameters(model)
    return averaged.module


def _normed(model: nn.Module) -> set[str]:
    kind = parametrizations._WeightNorm
    return _where(model, lambda m: any(isinstance(p, kind) for p in getattr(_list(m), "children", list)()))


def _list(module: nn.Module) -> object:
    return module.parametrizations.weight if parametrize.is_parametrized(module, "weight") else None


def _where(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> set[str]:
    return {name for name, module in model.named_modules() if is_one(module)}


def _owners(names: set[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names}


VERBS: dict[str, Verb] = {
    "compand_": Verb(compand_, fold_, early=True, touched=lambda m: _owners({s.name for s in companders(m)})),
    "AdamP": Verb(lambda model: model, optimizer=projected(AdamP)),
    "SGDP": Verb(lambda model: model, optimizer=projected(SGDP)),
    "weight_norm": Verb(_weight_norm, fold_, early=True, touched=_normed, ours=False),
    "prepare_ofq_": Verb(
        _ofq,
        lambda model: finish_ofq_(model) if any(True for _ in quantizers(model)) else model,
        early=True,
        moves=0.12,
        touched=lambda m: _owners({site.name for site in quantizers(m)}),
        plain=False,
        quantizes=True,
    ),
    "quantize_activations_": Verb(
        lambda model: quantize_activations_(model, data(), mode="static"),
        moves=0.05,
        touched=lambda m: _where(m, lambda module: hasattr(module, "input_quantizer")),
        plain=False,
    ),
    "round_to_nearest_": Verb(_nearest, moves=0.05, touched=lambda m: _owners({*quantized_weights(m)}), quantizes=True),
    "flexround_": Verb(_flexround, moves=0.05, touched=lambda m: _owners({*quantized_weights(m)}), quantizes=True),
    "apply_bone_": Verb(_bone, _unbone, touched=lambda m: {name for name, _ in bone_layers(m)}),
    "PEFT LoRA": Verb(
        _lora, _unload, touched=lambda m: _where(m, lambda x: isinstance(x, peft.tuners.lora.LoraLayer)), ours=False
    ),
    "torch prune": Verb(
        _prune,
        _unprune,
        early=True,
        moves=None,
        touched=lambda m: _where(m, lambda x: hasattr(x, "weight_mask")),
        ours=False,
    ),
    "ema": Verb(_ema, moves=None),
    "fold_": Verb(fold_),
    "save and load": Verb(lambda model: model),  # see `_apply`: it takes what was done before
}


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


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
        {_short(name) for name in verb.touched(m)} for m in (verb.apply(build()) if verb.ours else model, model)
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
