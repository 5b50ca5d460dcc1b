import pytest

from weightsmith.core.errors import MissingExtra, brief, near, reason, require, unknown


def test_a_missing_extra_names_the_command_that_installs_it():
    with pytest.raises(MissingExtra, match=r'no_such_module is needed for magic: pip install "weightsmith\[hf\]"'):
        require("no_such_module.part", extra="hf", purpose="magic")


def test_an_installed_module_is_returned():
    assert require("json", extra="hf", purpose="magic").dumps([1]) == "[1]"


def test_an_installed_module_with_a_broken_dependency_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing") as caught:
        require("half_installed", extra="hf", purpose="magic")
    assert not isinstance(caught.value, MissingExtra)


def test_near_names_come_first_and_all_names_when_none_is_near():
    assert near("adamq", ["adamp", "bone"]) == "did you mean 'adamp'?"
    assert near("zzz", ["adamp", "bone"]) == "known: 'adamp', 'bone'"
    assert near("zzz", [str(i) for i in range(9)], most=2) == "known: '0', '1' and 7 more"
    assert near("x", []) == "there are none"


def test_unknown_names_the_argument_and_the_value():
    assert str(unknown("preset", "laptp", ["laptop"])) == "preset 'laptp' is not known: did you mean 'laptop'?"


def test_what_a_file_says_is_shown_in_one_short_line():
    assert brief("a\nb\x1b") == r"'a\nb\x1b'"
    assert brief("x" * 100, most=10) == "'xxxxxx..."


def test_another_librarys_error_is_one_short_line():
    assert reason(RuntimeError("\n first \n second")) == "RuntimeError: first"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 1000))) == 300
