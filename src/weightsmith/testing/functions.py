"""What a function from tensors to tensors promises."""

from typing import Any

import torch
from torch import Tensor

from weightsmith.testing.kinds import Check, Function
from weightsmith.testing.measures import expect, same

_TOLERANCES = {torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}


def arguments_and_generators_are_left_alone(function: Function, _name: str) -> None:
    """A second call gives the same, from arguments that are as they were."""
    arguments = function.inputs()
    before = [one.clone() if isinstance(one, Tensor) else one for one in arguments]
    random = torch.get_rng_state()
    first = function.call(*arguments)
    expect(same(list(arguments), before), "a function without a trailing underscore must leave its arguments untouched")
    expect(torch.equal(torch.get_rng_state(), random), "randomness must come from a generator or seed that is given")
    expect(same(_tensors(first), _tensors(function.call(*arguments))), "the same arguments must give the same result")


def dtypes_are_kept(function: Function, _name: str) -> None:
    """Half and double precision in, the same out, near what float32 gives."""
    expected = _tensors(function.call(*function.inputs()))
    for dtype, tolerance in _TOLERANCES.items():
        found = _tensors(function.call(*_map(lambda t: t.to(dtype), function.inputs())))  # noqa: B023
        for one, other in zip(found, expected, strict=True):
            if not one.is_floating_point():
                continue
            if function.keeps_dtype:
                expect(one.dtype == dtype, f"outputs for {dtype} must be {dtype}, got {one.dtype}")
            expect(one.isfinite().all(), f"outputs for {dtype} must be finite")
            distance = (one.double() - other.double()).abs().mean() / other.double().abs().mean().clamp_min(1e-12)
            expect(
                bool(distance <= tolerance) or one.numel() == 0,
                f"outputs for {dtype} must be near those for float32, they are {float(distance):.3g} apart on average",
            )


def strides_do_not_matter(function: Function, _name: str) -> None:
    """Arguments that are not contiguous give the same."""
    strided = _map(lambda t: torch.stack([t, t], dim=-1)[..., 0], function.inputs())
    for one, other in zip(_tensors(function.call(*strided)), _tensors(function.call(*function.inputs())), strict=True):
        expect(torch.allclose(one, other, atol=1e-6), "arguments that are not contiguous must give the same result")


def it_compiles_without_graph_breaks(function: Function, _name: str) -> None:
    """``torch.compile(fullgraph=True)`` gives the same function."""
    torch._dynamo.reset()
    compiled = torch.compile(function.call, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        _tensors(compiled(*function.inputs())), _tensors(function.call(*function.inputs())), strict=True
    ):
        expect(torch.allclose(one, other, atol=1e-5), "the result must be the same under torch.compile")


def _map(change: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(change(one) if isinstance(one, Tensor) and one.is_floating_point() else one for one in arguments)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = result.values()
    if isinstance(result, (list, tuple)) or not isinstance(result, (int, float)):
        return [tensor for one in result for tensor in _tensors(one)]
    return [torch.tensor(result)]


FUNCTIONAL = (
    Check(arguments_and_generators_are_left_alone, ()),
    Check(dtypes_are_kept, ()),
    Check(strides_do_not_matter, ()),
    Check(it_compiles_without_graph_breaks, (), when=lambda function: function.compiles, compiles=True),
)
