"""Which techniques apply to a model, where, and why the others do not: read from its modules, without running it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from weightsmith.core.weights import output_head, owners
from weightsmith.search.supernet import SuperNet

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRICES = (nn.Linear, *_CONVOLUTIONS)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What a technique would do to a model.

    Attributes:
        slug: The technique.
        applies: Whether it does anything sensible there.
        text: Where, or why not.
    """

    slug: str
    applies: bool
    text: str


def suggest(model: nn.Module) -> list[Suggestion]:
    """Judge every technique that is available.

    Args:
        model: Any module, also on the meta device.
    """
    return [Suggestion(slug, *rule(model)) for slug, rule in RULES.items()]


def _adamp(model: nn.Module) -> tuple[bool, str]:
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    weights = [module for module in model.modules() if isinstance(module, _MATRICES)]
    if not norms:
        return False, "no normalization layer: no weight is scale-invariant, so nothing would be projected"
    if not weights:
        return False, "no linear or convolution layer"
    convolutions = sum(isinstance(module, _CONVOLUTIONS) for module in weights)
    kind = f"{convolutions} convolutions" if convolutions else f"{len(weights)} matrices"
    more = "" if convolutions else "; in pre-norm transformers few weights are scale-invariant, so expect little"
    return True, f"{len(norms)} normalization layers behind {kind}: use AdamP for AdamW, SGDP for SGD{more}"


def _compander(model: nn.Module) -> tuple[bool, str]:
    layers = [module for module in model.modules() if isinstance(module, _MATRICES)]
    if not layers:
        return False, "no linear or convolution layer"
    return True, f"{len(layers)} linear and convolution layers; for training from the start, mainly of convnets"


def _flexround(model: nn.Module) -> tuple[bool, str]:
    layers = [module for module in model.modules() if isinstance(module, _MATRICES)]
    if not layers:
        return False, "no linear or convolution layer"
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(module.weight.numel() for module in layers) / max(1, total)
    experts = _experts(model)
    more = f"; {len(experts)} three-dimensional expert tensors beside them" if experts else ""
    return True, f"{len(layers)} layers hold {share:.0%} of the parameters{more}; after training, with calibration data"


def _ofq(model: nn.Module) -> tuple[bool, str]:
    attention = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    if not attention:
        return False, "no attention module is recognized: the query-key product is what it is about"
    return True, f"{len(attention)} attention modules; for training on a grid of 2 to 4 bits"


def _bone(model: nn.Module) -> tuple[bool, str]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if len(layers) < 2:
        return False, "fewer than two linear layers: there is nothing to adapt beside the head"
    return True, f"{len(layers)} linear layers; for fine-tuning a pretrained model"


def _mwa(model: nn.Module) -> tuple[bool, str]:
    floats = sum(parameter.is_floating_point() for parameter in model.parameters())
    if not floats:
        return False, "no floating-point parameter"
    batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    more = "; measure batch statistics anew after merging" if batch else ""
    return True, f"any run that saves several checkpoints and logs a loss{more}"


def _mir_l(model: nn.Module) -> tuple[bool, str]:
    layers = [module for module in model.modules() if isinstance(module, _MATRICES)]
    if not layers:
        return False, "no linear or convolution layer"
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(module.weight.numel() for module in layers) / max(1, total)
    return True, f"{share:.0%} of the parameters can be pruned; costs a whole training per round"


def _weight_aligning(model: nn.Module) -> tuple[bool, str]:
    heads = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not heads:
        return False, "no linear layer that could be the classifier"
    name, head = list(heads.items())[-1]
    if len(owners(model).get(id(head._parameters.get("weight")), [None])) > 1:
        return False, f"{name} is tied to another layer, which would change with it"
    return True, f"the classifier {name}, {head.out_features} classes; for classes that arrive in steps"


def _meta_rescaling(model: nn.Module) -> tuple[bool, str]:
    if output_head(model) is not None:
        return False, "a language model has a label per token, and this weighs whole examples"
    heads = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    name, head = next(reversed(heads.items()), ("", None))
    if head is None or head.out_features < 2:
        return False, "no last linear layer of two outputs or more, as a classifier has"
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    more = "" if random else "; without dropout take passes=1"
    return True, f"the classifier {name}, {head.out_features} classes; where labels may be wrong{more}"


def _steer(model: nn.Module) -> tuple[bool, str]:
    if output_head(model) is None:
        return False, "not a language model: there are no tokens to weigh"
    return (
        True,
        "its tokens, in reinforcement learning with checkable rewards, through TRL's GRPOTrainer or your own loop",
    )


def _dynamic_rewards(model: nn.Module) -> tuple[bool, str]:
    if output_head(model) is None:
        return False, "not a language model: there is no policy that several rewards could train"
    return True, "where it is trained on several rewards; gradients are measured on the middle half of its blocks"


def _fast_ibp(model: nn.Module) -> tuple[bool, str]:
    layers = [module for module in model.modules() if isinstance(module, _MATRICES)]
    relus = sum(isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU) for module in model.modules())
    if len(layers) < 2:
        return False, "fewer than two linear or convolution layers"
    if any("attention" in type(module).__name__.lower() for module in model.modules()):
        return (
            False,
            "interval bounds grow too loose through attention to train for; certify.bounds still computes them",
        )
    more = f" and {relus} ReLUs" if relus else "; with ReLUs as functions, or none"
    return True, f"a classifier of {len(layers)} layers{more}; for training from the start with a proof as the aim"


def _rich_lazy(model: nn.Module) -> tuple[bool, str]:
    recurrent = [name for name, _ in model.named_parameters() if name.rpartition(".")[2].startswith("weight_hh")]
    if recurrent:
        return True, f"{len(recurrent)} recurrent matrices: low_rank_ through init.apply_ before training"
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    if not matrices:
        return False, "no weight of two dimensions: there is no rank to choose"
    return True, "no recurrent matrix to initialize; weightsmith diagnose measures how lazily any model has learnt"


def _eagan(model: nn.Module) -> tuple[bool, str]:
    if isinstance(model, SuperNet):
        return True, f"a super-network of {model.space.size():,} architectures: search.evolve"
    return False, "it holds no choices: write them as weightsmith.search.SuperNet to search among architectures"


def _lcia(model: nn.Module) -> tuple[bool, str]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return False, "no trainable parameter"
    size = 2 * sum(parameter.numel() * max(4, parameter.element_size()) for parameter in trained)
    return True, f"for tasks that arrive in steps; {size / 2**20:,.1f} MiB of state for what is trainable now"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _experts(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and parameter.numel() > 10_000 and "conv" not in name
    ]


RULES: dict[str, Callable[[nn.Module], tuple[bool, str]]] = {
    "fast-ibp": _fast_ibp,
    "rich-lazy": _rich_lazy,
    "weight-compander": _compander,
    "adamp": _adamp,
    "meta-rescaling": _meta_rescaling,
    "steer": _steer,
    "dynamic-reward-weighting": _dynamic_rewards,
    "mir-l": _mir_l,
    "flexround": _flexround,
    "ofq": _ofq,
    "bone": _bone,
    "mwa": _mwa,
    "weight-aligning": _weight_aligning,
    "lcia": _lcia,
    "eagan": _eagan,
}
"""A rule per available technique, in the order of the list of techniques."""
