"""Initializations."""

from weightsmith import init
from weightsmith.core.weights import is_linear
from weightsmith.testing import Change


def _weights(verb):
    """A verb on the weights of linear layers and convolutions, or of the layers that ``where`` names."""

    def apply(model, x, where=None):
        return init.apply_(model, verb, _of_layers(model, where))

    return apply


def _of_layers(model, where):
    from weightsmith.core.select import select

    chosen = select(model, where, default=is_linear)
    ids = {id(module.weight) for module in chosen.values() if hasattr(module, "weight")}
    return lambda name, parameter: id(parameter) in ids and parameter.dim() >= 2


_DEEP = ("conv-bn", "depthwise", "vit", "llama")  # of the others every layer feeds the output, and stays

CHANGES = {
    "weightsmith.init.ibp_": [
        Change(lambda model, x, where=None: init.ibp_(model, where=where, example=x), models=_DEEP)
    ],
    "weightsmith.init.apply_": [Change(_weights(lambda w: init.low_rank_(w, 1)))],
    "weightsmith.init.low_rank_": [Change(_weights(lambda w: init.low_rank_(w, 1, norm="spectral")))],
    "weightsmith.init.low_rank_from_": [Change(_weights(lambda w: init.low_rank_from_(w, 1)))],
    "weightsmith.init.soft_rank_": [Change(_weights(lambda w: init.soft_rank_(w, 1.0, "entropy")))],
    "weightsmith.init.dale_": [Change(_weights(lambda w: init.dale_(w, balanced=False)))],
}

ELSEWHERE = {
    # they need square matrices, or one of at least a weight's size: tests/init
    "weightsmith.init.block_",
    "weightsmith.init.chain_",
    "weightsmith.init.from_matrix_",
}
