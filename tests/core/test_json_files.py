import json
import math
import os

import pytest

from weightsmith.core.errors import UsageError
from weightsmith.core.json_files import parse_json, read_json, read_jsonl, read_text
from weightsmith.core.json_stream import stream_json


def file(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_what_has_the_expected_shape_comes_back_as_it_is(tmp_path):
    content = {"weight_map": {"a": "b"}, "other": [None, 1.5], "n": [1, 2]}
    path = file(tmp_path, json.dumps(content))
    assert read_json(path, {"weight_map": {str: str}, "n": [int], "gone?": str, "other": (str, list)}) == content


def test_a_byte_order_mark_is_no_content(tmp_path):
    assert read_json(file(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    assert list(read_jsonl(file(tmp_path, b'\xef\xbb\xbf{"a": 1}\n'))) == [(1, {"a": 1})]
    assert list(stream_json(file(tmp_path, b'\xef\xbb\xbf{"a": [1]}'), "a", int)) == [1]


@pytest.mark.parametrize(
    ("content", "shape", "message"),
    [
        ("[]", dict, "must be an object, got a list"),
        ("{}", {"a": str}, "must have a"),
        ('{"a": {"b": 3}}', {"a": {str: str}}, "a .b. must be a string, got 3"),
        ('{"a": [1, true]}', {"a": [int]}, r"a\[1\] must be a whole number, got true"),
        ('{"a": null}', {"a": (str, int)}, "a must be a string or a whole number, got null"),
        ('{"a": 1e999999}', {"a": int}, "must be a whole number, got Infinity"),
        ('{"a": 1' + "0" * 30 + "}", {"a": int}, "got a number of more than 64 bits"),
        ('{"a": 1' + "0" * 400 + "}", {"a": float}, "got a number of more than 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", dict, "damaged or not JSON"),
        ('{"a": "' + "x" * 500 + '"}', {"a": int}, "xxx\\.\\.\\.$"),
        ("[" * 65 + "]" * 65, object, "nested more than 64 levels"),
        ("[" * 200_000, object, "nested more than 64 levels"),
        ('{"a": ' * 200_000, object, "nested more than 64 levels"),
        (b'{"a": "\xe9"}', dict, "is not UTF-8 .byte 0xe9 at 7.: save it as UTF-8"),
        (r'{"a": "\ud800"}', dict, "lone surrogate"),
        ("", dict, "damaged or not JSON"),
        ('{"a": 1', dict, "damaged or not JSON"),
        (b"\0" * 10, dict, "damaged or not JSON"),
    ],
)
def test_what_has_not_is_one_error_that_names_the_file_and_the_place(tmp_path, content, shape, message):
    path = file(tmp_path, content)
    with pytest.raises(UsageError, match=message) as caught:
        read_json(path, shape)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_sixty_four_levels_are_read(tmp_path):
    read_json(file(tmp_path, "[" * 64 + "]" * 64), object)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing", "null\0"):
        with pytest.raises(UsageError, match=r"must be a file|cannot be read"):
            read_json(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("weightsmith.core.json_files.MOST_BYTES", 10)
    with pytest.raises(UsageError, match="more than 10 bytes"):
        read_json(file(tmp_path, '{"a": 1234567}'))
    with pytest.raises(UsageError, match="line 2, is longer"):
        list(read_jsonl(file(tmp_path, '{"a": 1}\n{"a": 1234567}\n')))


def test_what_to_do_ends_the_message(tmp_path):
    with pytest.raises(UsageError, match=r"; write it again$"):
        read_json(file(tmp_path, "{"), what_to_do="write it again")


def test_json_lines_end_at_line_feeds_and_at_nothing_else(tmp_path):
    rows = [{"text": "a\u2028b\u2029c\x85d\x0ce"}, {"text": "f"}]
    lines = [json.dumps(row, ensure_ascii=False).replace("\\f", "\x0c") for row in rows]
    path = file(tmp_path, f"{lines[1]}\r\n\n{json.dumps(rows[0], ensure_ascii=False)}")
    assert list(read_jsonl(path)) == [(1, rows[1]), (3, rows[0])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2, is damaged or not JSON"),
        (b'{"a": 1}\n[]\n', "line 2, must be an object"),
        (b'{"a": 1}\n\n{"a": "\xff"}\n', "line 3, is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        list(read_jsonl(file(tmp_path, content)))


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**18])
def test_a_list_is_read_entry_by_entry(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("weightsmith.core.json_stream._CHUNK", chunk)
    content = {"best": None, "n": 12.5e3, "log": [{"step": i, "é": "]}, \\"} for i in range(20)], "after": [[1], "x"]}
    for indent in (None, 2):
        path = file(tmp_path, json.dumps(content, indent=indent, ensure_ascii=False))
        assert list(stream_json(path, "log", {"step": int})) == content["log"]
    assert sum(stream_json(file(tmp_path, '{"log": [123, -Infinity]}'), "log", float)) == -math.inf
    assert list(stream_json(file(tmp_path, '{"log":[]}'), "log")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must have log, a list"),
        ("[]", "expected '{'"),
        ('{"log": {}}', "log must be a list"),
        ('{"log": [{}, 3]}', "entry 1, must be an object, got 3"),
        ('{"log": [{}', "expected ',', got its end|damaged"),
        ('{"log": [{}]', "got its end"),
        ('{"log": [{}]} x', "something follows"),
        ('{"log": [], "log": []}', "twice"),
        ('{"log": [{"a": "', "damaged or not JSON"),
        ('{"log": [' + "[" * 100_000, "nested more than 64"),
        ("{3: [", "damaged|must be a string"),
        (b'{"log": ["\xe9"]}', "not UTF-8"),
        ("", "got its end"),
    ],
)
def test_a_damaged_list_is_one_error(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        list(stream_json(file(tmp_path, content), "log"))


def test_text_is_utf_8_with_any_line_ends(tmp_path):
    assert read_text(file(tmp_path, "a\r\nb\rc\né")) == "a\nb\nc\né"
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(file(tmp_path, b"caf\xe9"))


def test_json_in_memory_is_checked_as_well():
    with pytest.raises(UsageError, match="block must be an object"):
        parse_json("[]", "block")
