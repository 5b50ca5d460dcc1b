"""What evaluations run on."""

from dataclasses import dataclass

from weightsmith.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Resources:
    """What evaluations run on.

    Attributes:
        engine: ``"local"`` or ``"ray"``.
        workers: Processes; ``None``: this one (local), as many as the cluster has room for (Ray).
        address: Of a running cluster, for example ``"auto"``; ``None``: Ray starts one on this machine.
        threads: Torch threads of an evaluation, and CPUs that Ray reserves. Results may depend on it, not on `workers`.
        gpus: Share of a GPU per Ray worker.
        device: Where workers put their copy of the model, for example ``"cuda"``; ``""``: where the model is.
    """

    engine: str = "local"
    workers: int | None = None
    address: str | None = None
    threads: int = 1
    gpus: float = 0.0
    device: str = ""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: Names the argument.
        """
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine must be 'local' or 'ray', got {self.engine!r}")
        if self.address is not None and self.engine != "ray":
            raise UsageError(f"address is for engine='ray', got {self.address!r} with engine='local'")
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.gpus < 0:
            raise UsageError(f"gpus must be at least 0, got {self.gpus}")
