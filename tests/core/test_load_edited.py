"""A file that was edited is run anew within one process, and so is what it imports from its folder."""

import importlib
import os
import sys
import time

import pytest

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.core.own_code import code_digest
from weightsmith.lab.fingerprint import function_digest


@pytest.mark.parametrize("edited", ["edited_main", "edited_helper"])
@pytest.mark.parametrize("by_path", [True, False])
def test_edited_code_is_run_anew(tmp_path, monkeypatch, edited, by_path):
    stem = f"{edited}_{by_path}"
    main, helper = tmp_path / f"main_{stem}.py", tmp_path / f"helper_{stem}.py"
    main.write_text(f"from helper_{stem} import one\ndef value():\n    return 1 * one\n")
    helper.write_text("one = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"{main.name if by_path else main.stem}:value"
    first = load_object(name, "--task")
    assert first() == 1
    assert load_object(name, "--task") is first  # nothing changed: the same object, as classes must stay the same

    if edited == "edited_main":
        main.write_text(main.read_text().replace("1 * one", "2 * one"))
    else:
        helper.write_text("one = 2\n")
    assert load_object(name, "--task")() == 2


TEXT = """
import functools
from dataclasses import dataclass
LIMIT = 3
calls = 0
@dataclass(frozen=True, slots=True)
class Config:
    lr: float = 0.1
    name: str = "x"
class Net:
    width = 8
    def forward(self, x):
        return x * 2
    @property
    def size(self):
        return 4
def noisy(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner
@noisy
def wrapped(x):
    return x + 5
def scaled(x, by=1.5, *, shift=7):
    global calls
    calls += 1
    return [y * by + shift for y in x]
"""
STRANGE = """
import enum, typing
class Kind(str, enum.Enum):
    ONE = "one"
class Extends(type):
    def __new__(cls, name, bases, names):
        return super().__new__(cls, name, bases, names | {"fields": ("a", "b")})
class Extended(metaclass=Extends):
    fields = ("b",)
@typing.overload
def read(x: int, y: int = 1): ...
def read(x, y=2): return x
for _index in range(3):
    COUNT = 0
COUNT = 5
def counted(function):
    function.__defaults__ = (9,)
    return function
@counted
def changed(x=1): return x
"""
EDITS = {
    "constant": ("LIMIT = 3", "LIMIT = 4"),
    "field": ("lr: float = 0.1", "lr: float = 0.2"),
    "attribute": ("width = 8", "width = 9"),
    "method": ("x * 2", "x * 3"),
    "property": ("return 4", "return 5"),
    "wrapped": ("x + 5", "x + 6"),
    "default": ("by=1.5", "by=2.5"),
    "keyword": ("shift=7", "shift=8"),
    "inner": ("y * by + shift", "y * by - shift"),
}


def imported(tmp_path, monkeypatch, name):
    path = tmp_path / f"{name}.py"
    path.write_text(TEXT)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module, path


@pytest.mark.parametrize("edit", EDITS)
def test_a_module_that_was_edited_after_its_import_has_no_digest(tmp_path, monkeypatch, edit):
    module, path = imported(tmp_path, monkeypatch, f"outdated_{edit}")
    module.scaled([1])
    before = code_digest(module)
    path.write_text("# a comment\n" + TEXT)
    assert code_digest(module) != before  # what runs is still what the text says
    path.write_text(TEXT.replace(*EDITS[edit]))
    with pytest.raises(UsageError, match=f"edited after module 'outdated_{edit}' was imported"):
        code_digest(module)


def test_a_function_from_before_a_reload_has_no_digest(tmp_path, monkeypatch):
    module, path = imported(tmp_path, monkeypatch, "reloaded_since")
    old = module.scaled
    path.write_text(TEXT.replace("y * by", "y + by"))
    os.utime(path, (time.time() + 9,) * 2)  # bytecode is told apart by size and time
    importlib.reload(module)
    assert function_digest(module.scaled)
    with pytest.raises(UsageError, match="'scaled' is not the function of this name"):
        function_digest(old)


def test_what_decorators_and_metaclasses_make_is_no_edit(tmp_path, monkeypatch):
    path = tmp_path / "strange_code.py"
    path.write_text(STRANGE)
    os.utime(path, (time.time() - 10**6,) * 2)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("strange_code")
    monkeypatch.setitem(sys.modules, "strange_code", module)
    assert code_digest(module)
    assert function_digest(module.changed)
