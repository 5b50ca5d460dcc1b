"""What a user does to a model, one entry per verb, and a small model to do it to."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from weightsmith import fold_
from weightsmith.adapt import BoneConfig, apply_bone_, unload_bone_
from weightsmith.adapt.registry import bone_layers
from weightsmith.average import ema
from weightsmith.optim import SGDP, AdamP
from weightsmith.quantize import (
    Grid,
    calibrate_,
    finish_ofq_,
    flexround_,
    prepare_ofq_,
    quantize_activations_,
    quantized_weights,
    round_to_nearest_,
)
from weightsmith.quantize.in_training.weight_quantizer import sites as quantizers
from weightsmith.reparam import InWeightSpace, compand_
from weightsmith.reparam.apply import sites as companders


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
        if short(name) in BODY:
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
    "save and load": Verb(lambda model: model),  # see compositions.py: it takes what was done before
}


def short(name: str) -> str:
    """What a layer was called before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")
