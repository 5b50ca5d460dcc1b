"""What is loaded from a model folder through ``transformers``: none of the folder's code is run unless asked for."""

from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError, brief, reason


def load_pretrained(loader: Any, folder: Path | str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call ``loader.from_pretrained`` on a folder.

    Args:
        loader: A class of ``transformers``, such as ``AutoTokenizer``.
        folder: The folder.
        trust_remote_code: Whether Python files that the folder brings may be run.
        **options: For ``from_pretrained``.

    Raises:
        UsageError: The folder needs code of its own and ``trust_remote_code`` is false, or its files are damaged.
    """
    try:
        return loader.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (ImportError, MemoryError, UsageError):
        raise
    except Exception as error:  # what a damaged file leads to in there can be anything
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UsageError(
                f"{folder} needs Python code of its own to be run, which could do anything: read that code, then pass "
                "trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise UsageError(f"{loader.__name__} cannot be loaded from {folder}: {reason(error)}") from error


def model_class(folder: Path | str, architectures: Any) -> Any:
    """Look up the class that a ``config.json`` names.

    Args:
        folder: Where it was found, for errors.
        architectures: What it says under that key.

    Raises:
        UsageError: It names none, or none that ``transformers`` has.
    """
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UsageError(f"{folder}/config.json names architecture {brief(name)}, which transformers does not have")
    return found
