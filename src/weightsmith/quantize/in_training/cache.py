"""Quantize every weight once for several passes, where the caller guarantees that no weight changes in between.

There is no safe way to notice a change by itself: fused optimizers and writes through ``.data`` do not raise a tensor's
version. So values are kept only within a block that says so; a version that has increased still invalidates the value.
"""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn


class VersionCache:
    """Remembers one tensor while it is open."""

    def __init__(self) -> None:
        self.open = False
        self._versions: tuple[int, ...] = ()
        self._value: Tensor | None = None

    def __call__(self, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """Return what ``make()`` gives, or gave before if the cache is open and no source has a new version.

        Args:
            make: Makes the value without recording gradients.
            *sources: What it is made from; the same tensors in every call.

        Returns:
            The value; each time a new alias of it, so that it can be the output of an autograd function.
        """
        if not self.open:
            return make()
        if self._value is None or _versions(self._value, *sources) != self._versions:
            self._value = make().detach()
            self._versions = _versions(self._value, *sources)
        return self._value.detach()

    def close(self) -> None:
        """Forget the value."""
        self.open, self._value = False, None


@contextlib.contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once within the block: for the micro-batches of one optimizer step, or an evaluation.

    Take no optimizer step inside.

    Args:
        model: What ``prepare_ofq_`` returned.

    Example:
        >>> with cached_weights(model):  # doctest: +SKIP
        ...     for batch in micro_batches:
        ...         loss(model(batch)).backward()
        >>> optimizer.step()  # doctest: +SKIP
    """
    held = [vars(module).get("_cache") for module in model.modules()]
    caches = [cache for cache in held if isinstance(cache, VersionCache)]
    for cache in caches:
        cache.open = True
    try:
        yield
    finally:
        for cache in caches:
            cache.close()


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
