"""Names, paths and texts that others chose, on their way to a terminal or a page: they are shown, never obeyed."""

import re
import unicodedata

from rich.markup import escape

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]?"
)
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~$&])")
_FORMAT = re.compile(r"[+]?,?(?:\.\d{1,2})?[efg%]")
_SAFE_TARGET = re.compile(r"https?://[^\s]+|(?![/\\])[^\s:]*")


def printable(text: object) -> str:
    """Take everything out of a text that could steer a terminal.

    Control sequences go as a whole, other control characters and marks that change the direction of text go, a line
    break or tab becomes a space, half a character (of a path that is not UTF-8) a replacement character.

    Args:
        text: Anything; it is turned into a string.
    """
    plain = _SEQUENCE.sub("", str(text))
    return "".join(map(_shown, plain)) if not plain.isprintable() else plain


def markup(text: object) -> str:
    r"""Make a text stand for itself in rich's markup: printable, ``[`` escaped.

    Example:
        >>> markup("out[/q]\x1b[31m")
        'out\\[/q]'
    """
    return escape(printable(text))


def markdown(text: object) -> str:
    r"""Make a text stand for itself in one line of Markdown, also in a cell of a table; HTML is escaped, too.

    Example:
        >>> markdown("a|b <script>")
        'a\\\\|b \\\\<script\\\\>'
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


def markdown_link(text: object, target: object) -> str:
    """A Markdown link where the target is a web address or a relative path; else the text alone.

    Example:
        >>> markdown_link("page", "https://example.org/a b")
        'page'
        >>> markdown_link("chart", "charts/loss.svg")
        '[chart](<charts/loss.svg>)'
    """
    address = printable(target)
    if address != str(target) or not _SAFE_TARGET.fullmatch(address) or any(mark in address for mark in "<>\\"):
        return markdown(text)
    return f"[{markdown(text)}](<{address}>)"


def is_number_format(spec: str) -> bool:
    """Whether a format specification out of a file is one of ours: ``e``, ``f``, ``g`` or ``%``, up to 99 digits."""
    return _FORMAT.fullmatch(spec) is not None


def _shown(character: str) -> str:
    if character in "\n\r\t\v\f\x85\u2028\u2029":
        return " "
    category = unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return "" if category == "Cc" or character in _BIDIRECTIONAL else character
