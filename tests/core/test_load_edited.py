"""A file that was edited is run anew within one process, and so is what it imports from its folder."""

import pytest

from weightsmith.core.load import load_object


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
