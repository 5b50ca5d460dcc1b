"""Changed copies of valid files: byte by byte, and inside of what they say."""

import json
import random

_MARKS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\n",
    b"\0",
    b"\xff",
    b"-",
    b"1e999",
    b"\\ud800",
    b"null",
    b"NaN",
    b"../",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b"9" * 30,
]
_VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "../x",
    "/etc/passwd",
    "\0",
    "\x1b[31m",
    "(a+)+",
    "[",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    {"": None},
    ["a", 1],
    {"weight": "model.safetensors"},
]
_KEYS = ["", "a", "weight", "__metadata__", "../x", "\0", "shape", "dtype"]


def mutate(content: bytes, kind: str, draw: random.Random) -> bytes:
    """Change a file's content by one to a few steps.

    Args:
        content: A valid file.
        kind: ``"json"``, ``"jsonl"``, ``"safetensors"``, or anything else for bytes alone.
        draw: Where all chance comes from.
    """
    changes = {"json": _json, "jsonl": _jsonl, "safetensors": _safetensors}
    if kind in changes and draw.random() < 0.6:
        content = changes[kind](content, draw)
        if draw.random() < 0.8:
            return content
    return _bytes(content, draw)


def _bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        at = draw.randrange(len(data) + 1)
        size = min(len(data) - at, draw.choice([1, 1, 2, 8, 64, 4096]))
        way = draw.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif way == 1 and at < len(data):
            data[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif way == 2:
            del data[at : at + size]
        elif way == 3:
            data[at:at] = draw.choice(_MARKS)
        elif way == 4:
            data[at:at] = data[at : at + size] * draw.choice([1, 2, 50])
        elif way == 5:
            del data[at:]
        else:
            other = draw.randrange(len(data) + 1)
            data[at : at + size] = data[other : other + size]
    return bytes(data)


def _json(content: bytes, draw: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        value = _change(value, draw)
    if draw.random() < 0.02:
        value = _nested(draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return text.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"]), errors="surrogatepass")


def _jsonl(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = _json(lines[at] or b"{}", draw)
    return draw.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]).join(lines)


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + size], draw)
    if draw.random() < 0.9:
        header += b" " * (-len(header) % 8)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**31, 2**63, len(header) - 1, len(header) + 8])
    return length.to_bytes(8, "little") + header + content[8 + size :]


def _change(value, draw):
    """Change one place of a JSON value, the deeper ones as often as the others."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return _other(value, draw)
    if isinstance(value, list):
        value = list(value)
        at = draw.randrange(len(value))
        way = draw.randrange(6)
        if way == 0:
            del value[at]
        elif way == 1:
            value.insert(at, draw.choice([*_VALUES, value[at]]))
        else:
            value[at] = _change(value[at], draw)
        return value
    value = dict(value)
    key = draw.choice(list(value))
    way = draw.randrange(8)
    if way == 0:
        del value[key]
    elif way == 1:
        value[draw.choice([*_KEYS, *value])] = value.pop(key)
    elif way == 2:
        value[draw.choice(_KEYS)] = draw.choice(_VALUES)
    else:
        value[key] = _change(value[key], draw)
    return value


def _other(value, draw):
    if isinstance(value, int | float) and draw.random() < 0.4:
        return draw.choice([value + 1, value - 1, -value, value * 2, str(value), [value]])
    if isinstance(value, str) and draw.random() < 0.4:
        return draw.choice([value[1:], value + "x", value.upper(), value * 3, [value], {value: value}])
    return draw.choice(_VALUES)


def _nested(draw):
    value = 1
    for _ in range(draw.choice([60, 70, 300])):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value
