"""The Hugging Face hub, asked without long waits and without progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from weightsmith.core.errors import UsageError


def check_hub(kind: Literal["dataset", "model"], hub_id: str, *, cached: Callable[[], object], fix: str) -> None:
    """Make sure within seconds that the hub has something, where loading it would give up only after many retries.

    Args:
        kind: What to look for.
        hub_id: ``"owner/name"``.
        cached: Asked instead when ``HF_HUB_OFFLINE`` is set; raises when there is no copy on this machine.
        fix: What to do without a network; ends the error.

    Raises:
        UsageError: The hub has no such thing, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        if constants.HF_HUB_OFFLINE:
            cached()
        else:
            HfApi().repo_info(hub_id, repo_type=kind, timeout=5)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"the hub shows no {kind} {hub_id!r}: correct the name, give an existing folder, or log in if it is private"
        ) from error
    except Exception as error:  # what a missing network raises depends on the version of the HTTP library
        raise UsageError(f"{kind} {hub_id!r} is unavailable from the hub ({type(error).__name__}): {fix}") from error


@contextmanager
def switched_off(is_on: bool, disable: Callable[[], object], enable: Callable[[], object]) -> Iterator[None]:
    """Keep a library's progress bars off within the block.

    Args:
        is_on: Whether they are on now; otherwise nothing is done.
        disable: Switches them off.
        enable: Switches them on.
    """
    if not is_on:
        yield
        return
    disable()
    try:
        yield
    finally:
        enable()
