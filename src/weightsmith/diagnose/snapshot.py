"""What a probe remembers of a model: enough to say later how far it has moved, as plain tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, reason
from weightsmith.diagnose.kernels import TangentKernel
from weightsmith.diagnose.options import KernelPlan

_META = "meta"
_GROUPS = ("weights", "similarities", "signs", "kernel")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model at one moment, on the CPU.

    Attributes:
        weights: The chosen parameters by name.
        similarities: By layer: ``H H^T`` of its activity, ``(N, N)``, float64.
        signs: By layer: signs of its activity, ``(N, units)``, int8; 2 stands for NaN.
        kernel: The tangent kernel; ``None`` without one.
        digest: Of the inputs.
    """

    weights: Mapping[str, Tensor]
    similarities: Mapping[str, Tensor]
    signs: Mapping[str, Tensor]
    kernel: TangentKernel | None
    digest: str

    def state_dict(self) -> dict[str, Tensor]:
        """Give everything as tensors by name, as `safetensors.torch.save_file` takes them."""
        plan = None
        if self.kernel is not None:
            plan = asdict(self.kernel.plan)
            plan["dtype"] = str(plan["dtype"]).removeprefix("torch.")
        meta = json.dumps({"digest": self.digest, "plan": plan}).encode()
        found = {_META: torch.frombuffer(bytearray(meta), dtype=torch.uint8)}
        kernel = self.kernel.parts if self.kernel is not None else {}
        for group, tensors in zip(_GROUPS, (self.weights, self.similarities, self.signs, kernel), strict=True):
            found |= {f"{group}/{name}": tensor.contiguous() for name, tensor in tensors.items()}
        return found

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Snapshot":
        """Take back what `state_dict` gave.

        Raises:
            UsageError: It is something else.
        """
        try:
            meta = json.loads(bytes(state[_META].to(torch.uint8).tolist()))
            plan = dict(meta["plan"]) if meta["plan"] is not None else None
            groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
            for key, tensor in state.items():
                group, slash, name = key.partition("/")
                if slash:
                    groups[group][name] = tensor
            kernel = None
            if plan is not None:
                kernel = TangentKernel(groups["kernel"], KernelPlan(**plan | {"dtype": _DTYPES[plan["dtype"]]}))
            return cls(groups["weights"], groups["similarities"], groups["signs"], kernel, str(meta["digest"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"state is no snapshot of a LazinessProbe: {reason(error)}") from error
