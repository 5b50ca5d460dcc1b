"""Backward bounds of intermediate operations: what the method ``"crown"`` puts in the place of intervals."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.crown import Axes, Backward, ReluMode
from weightsmith.certify.interval import Interval
from weightsmith.certify.passes import Pass
from weightsmith.certify.pools import POOLS
from weightsmith.certify.rules import RULES
from weightsmith.core.graph import SHAPE_ONLY, Graph, Node, leaves

_KINKED = ("relu", "leaky_relu", "prelu")
_AS_PEERS = (*_KINKED, *POOLS, "sigmoid", "tanh")
"""What takes backward bounds as they are; others, such as ``log``, also need what only interval bounds may tell."""
_MOST_NUMBERS = 2**26
"""Coefficients that are held for one operation at a time."""


def refiner(graph: Graph, axes: Axes, batch: int, relu: ReluMode, intersect: bool) -> Callable[[Pass, Node], None]:
    """For the method ``"crown"``: replace the bounds of what enters a nonlinear operation by backward ones.

    The bounds of an operation that is not linear itself are its own function of its input's, and a first layer's
    interval is exact already. Of what enters ReLUs only those elements need a pass that are unstable in some example.
    """
    users = graph.users()

    def refine(done: Pass, node: Node) -> None:
        curved = [user for user in users[node] if not _is_affine(user)]
        if not curved or not _ends_a_linear_part(done, node) or _is_exact(done, node):
            return
        old = done.values[node]
        ends = torch.stack([old.lower, old.upper])
        low, high = axes[node].split(ends, batch)
        chosen = torch.arange(low.shape[1], device=low.device)
        if all(user.op in _KINKED for user in curved):
            chosen = ((low < 0) & (high > 0)).any(0).nonzero()[:, 0]
            if not len(chosen):
                return
        backward = Backward(done, axes, batch, relu)
        found_low, found_high = _of_elements(backward, node, chosen, old.shape)
        if intersect or not all(user.op in _AS_PEERS for user in curved) or node.op in ("matmul", "scores", "mul"):
            found_low, found_high = torch.maximum(found_low, low[:, chosen]), torch.minimum(found_high, high[:, chosen])
        low, high = low.index_copy(1, chosen, found_low), high.index_copy(1, chosen, found_high)
        done.values[node] = Interval(*axes[node].join(torch.stack([low, high]), old.shape))

    return refine


def _of_elements(backward: Backward, node: Node, chosen: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Bounds ``(B, len(chosen))`` of elements of a node's output, a part of them at a time."""
    width = shape.numel() // backward.batch
    largest = max(v.sample.numel() for v in backward.done.values.values() if isinstance(v, Interval))
    step = max(1, _MOST_NUMBERS // (2 * largest))
    low, high = [], []
    for part in chosen.split(step):
        dtype, device = backward.done.options.dtype, part.device
        one = F.one_hot(part, width).to(dtype).to(device)
        both = torch.cat([one, -one])[:, None].expand(-1, backward.batch, -1)
        found = backward.lower(node, backward.axes[node].join(both, shape))
        low.append(found[:, : len(part)])
        high.append(-found[:, len(part) :])
    return torch.cat(low, 1), torch.cat(high, 1)


def _is_affine(node: Node) -> bool:
    if node.op in ("batch_norm", "dropout", "channel_dropout") or node.op in SHAPE_ONLY:
        return True
    rule = RULES.get(node.op)
    if rule is None:
        return False
    return rule.affine or (node.op in ("mul", "div", "matmul") and sum(p.varies for p in node.parents) == 1)


def _ends_a_linear_part(done: Pass, node: Node) -> bool:
    """Whether the node, or what it was moved from, is affine or a product: a backward pass can tell more."""
    rule = RULES.get(node.op)
    if rule is not None and rule.reshapes:
        return any(_ends_a_linear_part(done, parent) for parent in node.parents if parent.varies)
    return _is_affine(node) or node.op in ("matmul", "scores", "mul")


def _is_box(done: Pass, node: Node) -> bool:
    if node in done.graph.inputs:
        return True
    rule, unknown = RULES.get(node.op), [parent for parent in node.parents if parent.varies]
    return rule is not None and rule.reshapes and len(unknown) == 1 and _is_box(done, unknown[0])


def _is_exact(done: Pass, node: Node) -> bool:
    """Whether its interval cannot be tighter: one affine operation on a box."""
    call = done.calls.get(node)
    if call is None:
        return True
    unknown = [leaf for leaf in leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Node) and leaf.varies]
    return len(unknown) == 1 and _is_box(done, unknown[0])


# --- where the examples are -------------------------------------------------------------------------------------------
