"""How a tangent kernel is to be computed, and what that will take."""

from dataclasses import dataclass
from typing import Literal

import torch

from weightsmith.core.errors import UsageError, unknown

Method = Literal["auto", "jacobian", "contract", "sketch"]
Reduce = Literal["full", "trace", "random"]

METHODS = ("auto", "jacobian", "contract", "sketch")
REDUCTIONS = ("full", "trace", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """How tangent kernels are computed.

    Attributes:
        method: ``"auto"`` takes ``jacobian`` if all of ``J`` fits the budget, then ``contract`` where it fits and
            helps, then ``jacobian`` in blocks, and ``sketch`` if not even the kernel fits.
        reduce: ``"full"``: all outputs of all samples; ``"trace"``: ``sum_k K[(a, k), (b, k)]``, of ``(N, N)``;
            ``"random"``: one fixed random combination of the outputs of each sample, ``(N, N)``. They are different
            numbers: compare equal with equal.
        budget: Bytes for what is held at a time.
        probes: Directions of a sketch, at least 3.
        seed: Of those directions, and of the random combination.
        dtype: Of the kernel; ``None``: float64 for float64 models, else float32.
    """

    method: Method = "auto"
    reduce: Reduce = "full"
    budget: int = 2**30
    probes: int = 512
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("reduce", self.reduce, REDUCTIONS)):
            if value not in known:
                raise unknown(name, str(value), known)
        if not self.budget > 0:
            raise UsageError(f"budget must be bytes above 0, got {self.budget}")
        if self.probes < 3:
            raise UsageError(f"probes must be at least 3, got {self.probes}")
        if self.dtype not in (None, torch.float32, torch.float64):
            raise UsageError(f"dtype must be float32 or float64, got {self.dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlan:
    """What computing a kernel will take.

    Attributes:
        method: The way that was asked for or chosen.
        reduce: See `KernelOptions`.
        samples: Number of samples.
        outputs: Outputs per sample.
        parameters: Real numbers in the chosen parameters.
        contracted: Share of them whose kernel needs no Jacobian.
        layers: Modules that get a kernel of their own; with ``sketch`` there is one for all.
        probes: Directions of a sketch; 0 otherwise.
        memory: Bytes at the peak, about, beyond the model and one forward pass.
        seconds: Time, about, from one forward pass and the speed of a matrix product on this machine.
        budget: The bytes allowed.
        dtype: Of the kernel.
    """

    method: str
    reduce: str
    samples: int
    outputs: int
    parameters: int
    contracted: float
    layers: int
    probes: int
    memory: int
    seconds: float
    budget: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Rows of the kernel."""
        return self.samples * self.outputs if self.reduce == "full" else self.samples

    def __str__(self) -> str:
        how = {
            "jacobian": "explicit Jacobian",
            "contract": f"contraction of {self.contracted:.0%} of the parameters, Jacobian of the rest",
            "sketch": f"sketch with {self.probes} directions",
        }[self.method]
        outputs = {"full": "all outputs", "trace": "trace over outputs", "random": "a random combination of outputs"}
        return (
            f"{how}, {outputs[self.reduce]}: {self.rows} rows ({self.samples} samples, {self.outputs} outputs), "
            f"{self.parameters:,} parameters in {self.layers} layers, {str(self.dtype).removeprefix('torch.')}; "
            f"about {in_bytes(self.memory)} of {in_bytes(self.budget)}, about {self.seconds:.2g} s"
        )


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
