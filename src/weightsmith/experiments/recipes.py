"""Techniques put on somebody's training from outside: what each does to model, optimizer and end of training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.fold import fold_
from weightsmith.lab.trial import Groups, OptimizerPlan, Recipe
from weightsmith.optim import SGDP, AdamP
from weightsmith.reparam import InWeightSpace, add_weight_decay_grad_, compand_
from weightsmith.reparam.apply import sites

_SGD_OPTIONS = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "foreach", "maximize"}
_ADAM_OPTIONS = {"lr", "betas", "eps", "weight_decay", "foreach", "maximize", "capturable"}


class _Projected(Recipe):
    """Another optimizer class with the same options."""

    takes: tuple[type[torch.optim.Optimizer], ...]
    makes: type[torch.optim.Optimizer]
    allowed: set[str]

    def optimizer(self, plan: OptimizerPlan, model: nn.Module) -> OptimizerPlan:
        if plan.make not in self.takes:
            names = " or ".join(f"torch.optim.{kind.__name__}" for kind in self.takes)
            other = "sgdp" if self.name == "adamp" else "adamp"
            raise UsageError(
                f"{self.name} takes the place of {names}, this training uses {_named(plan.make)}: try {other}"
            )
        extra = {name for name, value in plan.options.items() if name not in self.allowed and value}
        if extra:
            raise UsageError(f"{self.name} has no option {', '.join(sorted(extra))}")
        decays = any(options.get("weight_decay") for options in (plan.options, *plan.groups))
        if plan.make is torch.optim.Adam and decays:
            raise UsageError(
                "adamp decays as AdamW does, this training uses Adam with weight_decay: use torch.optim.AdamW"
            )
        options = {name: value for name, value in plan.options.items() if name in self.allowed}
        if plan.make is torch.optim.AdamW:  # for groups that say nothing
            options.setdefault("weight_decay", 1e-2)  # AdamW's own default
        return replace(plan, make=self.makes, options=options)


class AdamPRecipe(_Projected):
    """AdamP in the place of AdamW."""

    name, title, text = "adamp", "AdamP", "AdamP instead of AdamW"
    takes, makes, allowed = (torch.optim.AdamW, torch.optim.Adam), AdamP, _ADAM_OPTIONS


class SGDPRecipe(_Projected):
    """SGDP in the place of SGD."""

    name, title, text = "sgdp", "SGDP", "SGDP instead of SGD"
    takes, makes, allowed = (torch.optim.SGD,), SGDP, _SGD_OPTIONS


class CompanderRecipe(Recipe):
    """Companded weights; SGD works on ``v`` as in the paper, every other optimizer in weight space."""

    name, title, text = (
        "weight-compander",
        "Weight Compander",
        "weights written as 0.7 arctan(v / 0.7), folded at the end",
    )

    def model(self, model: nn.Module, example: Any) -> nn.Module:
        return compand_(model, overflow="clip")

    def optimizer(self, plan: OptimizerPlan, model: nn.Module) -> OptimizerPlan:
        if not _is_sgd(plan.make):
            return replace(plan, after=(*plan.after, lambda optimizer: InWeightSpace(optimizer, model)))
        companded = {id(site.v) for site in sites(model)}
        decay = {
            group.get("weight_decay", plan.options.get("weight_decay", 0.0))
            for group in plan.groups
            if any(id(parameter) in companded for parameter in group["params"])
        }
        if len(decay) > 1:
            raise UsageError(f"weight-compander needs one weight_decay for all its weights, got {sorted(decay)}")
        (value,) = decay or {0.0}

        def decay_weights(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            def add_decay(*_: Any) -> None:
                add_weight_decay_grad_(model, value)

            optimizer.register_step_pre_hook(add_decay)
            return optimizer

        after = (*plan.after, decay_weights) if value else plan.after
        return replace(plan, groups=_without_decay(plan.groups, companded), after=after)

    def finish(self, model: nn.Module, calibration: Any) -> nn.Module:
        return fold_(model)


class BoneRecipe(Recipe):
    """A MiSS adapter in the place of full fine-tuning, merged at the end."""

    name, title, text = (
        "bone",
        "Bone (MiSS)",
        "frozen weights and one small shared tensor per matrix, merged at the end",
    )

    def model(self, model: nn.Module, example: Any) -> nn.Module:
        from weightsmith.adapt import BoneConfig, apply_bone_

        smallest = min((min(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)), default=64)
        return apply_bone_(model, BoneConfig(r=max(1, min(64, smallest // 2)), variant="miss"))

    def optimizer(self, plan: OptimizerPlan, model: nn.Module) -> OptimizerPlan:
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return replace(plan, groups=[{"params": wanted}])

    def finish(self, model: nn.Module, calibration: Any) -> nn.Module:
        from weightsmith.adapt import unload_bone_

        return unload_bone_(model, merge=True)


class MergeRecipe(Recipe):
    """The last four states that were recorded with a loss, merged with weights from it."""

    name, title, text = "mwa", "MWA", "merges the last 4 recorded states, weighted by their loss"
    last = 4

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def record(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        key = next((name for name in numbers if "loss" in name.lower()), None)
        if key is None:
            return
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.states, self.losses = (
            [*self.states, state][-self.last :],
            [*self.losses, float(numbers[key])][-self.last :],
        )

    def finish(self, model: nn.Module, calibration: Any) -> nn.Module:
        from weightsmith.average import average_state_dicts, metric_weights

        if not self.states:
            raise UsageError("mwa merges what trial.record(..., loss=...) has seen, and no loss was recorded")
        model.load_state_dict(average_state_dicts(self.states, metric_weights(self.losses, "loss").tolist()))
        return model


class OFQRecipe(Recipe):
    """Quantization-aware training at 4 bits with OFQ; the network stays quantized."""

    name, title, text = "ofq", "OFQ", "4-bit weights and activations while training (StatsQ, QKR)"

    def model(self, model: nn.Module, example: Any) -> nn.Module:
        from weightsmith.quantize import calibrate_, prepare_ofq_

        if example is None:
            raise UsageError("ofq needs a batch to set its scales: trial.model(model, example=batch)")
        prepare_ofq_(model, weight_bits=4, activation_bits=4, qk_reparam="auto", keep_query_bias=True)
        return calibrate_(model, example)


class FlexRoundRecipe(Recipe):
    """4-bit rounding after training."""

    name, title, text = "flexround", "FlexRound", "4-bit weights, rounded after training"
    iterations = 1000  # per block

    def finish(self, model: nn.Module, calibration: Any) -> nn.Module:
        from weightsmith.quantize import Grid, flexround_

        if calibration is None:
            raise UsageError("flexround needs inputs to calibrate with: trial.finish(model, calibration=inputs)")
        try:
            flexround_(model, calibration, Grid(4), seed=0, iterations=self.iterations)
        except UsageError:  # the model is no row of similar blocks; nothing has been changed
            flexround_(model, calibration, Grid(4), seed=0, iterations=self.iterations, blocks="layers")
        return model


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.name: recipe
    for recipe in (AdamPRecipe, SGDPRecipe, CompanderRecipe, BoneRecipe, MergeRecipe, OFQRecipe, FlexRoundRecipe)
}

COMPOSES = frozenset(
    frozenset(pair)
    for pair in (
        ("adamp", "weight-compander"), ("sgdp", "weight-compander"), ("adamp", "bone"), ("adamp", "mwa"),
        ("sgdp", "mwa"), ("weight-compander", "mwa"), ("bone", "mwa"), ("adamp", "flexround"), ("sgdp", "flexround"),
        ("weight-compander", "flexround"), ("mwa", "flexround"), ("bone", "flexround"), ("adamp", "ofq"),
        ("sgdp", "bone"), ("sgdp", "ofq"),
    )
)  # fmt: skip
"""Pairs that the contract suite trains together."""


def recipes(techniques: str) -> list[Recipe]:
    """Fresh recipes for ``"adamp+weight-compander"``; none for ``""``.

    Model changes come before optimizers, and what acts at the end of training acts in the opposite order.

    Raises:
        UsageError: A technique has no recipe, is named twice, or two do not combine.
    """
    names = [name.strip() for name in techniques.split("+") if name.strip()]
    for name in names:
        if name not in RECIPES:
            raise unknown("technique", name, RECIPES)
    ranked = sorted(names, key=_RANK.__getitem__)
    for first, second in pairwise(ranked):
        if first == second:
            raise UsageError(f"technique {first!r} is named twice in {techniques!r}")
    for first in ranked:
        for second in ranked:
            if first < second and frozenset((first, second)) not in COMPOSES:
                raise UsageError(f"{first} and {second} are not known to combine; known: {_pairs(first)}")
    return [RECIPES[name]() for name in ranked]


_RANK = {"flexround": -3, "mwa": 2, "bone": -1, "ofq": -1, "weight-compander": 0, "adamp": 1, "sgdp": 1}


def _pairs(name: str) -> str:
    partners = sorted(partner for pair in COMPOSES if name in pair for partner in pair - {name})
    return ", ".join(f"{name}+{partner}" for partner in partners) or "none"


def _without_decay(groups: Iterable[Mapping[str, Any]], ids: set[int]) -> Groups:
    found: Groups = []
    for group in groups:
        special = [parameter for parameter in group["params"] if id(parameter) in ids]
        rest = [parameter for parameter in group["params"] if id(parameter) not in ids]
        found += [{**group, "params": rest}] if rest else []
        found += [{**group, "params": special, "weight_decay": 0.0}] if special else []
    return found


def _is_sgd(make: Callable[..., Any]) -> bool:
    return isinstance(make, type) and (issubclass(make, torch.optim.SGD) or make.__name__ == "SGDP")


def _named(make: Callable[..., Any]) -> str:
    return getattr(make, "__name__", repr(make))
