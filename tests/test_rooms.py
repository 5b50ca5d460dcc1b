"""One tuple names the folders of techniques; everything that repeats it is held to it here."""

import ast
import inspect
import tomllib
from pathlib import Path
from typing import get_type_hints

import weightsmith as ws

ROOT = Path(__file__).parents[1]
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_every_room_is_a_door_with_a_face():
    for room in ws.ROOMS:
        face = getattr(ws, room)
        assert face.__doc__
        assert all(hasattr(face, name) for name in face.__all__)
        assert f"ws.{room} " in ws.__doc__


def test_type_checkers_see_the_same_doors():
    tree = ast.parse((ROOT / "src/weightsmith/__init__.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "weightsmith"
        for alias in node.names
    }
    assert imported == set(ws.ROOMS)
    assert set(ws.__all__) == {*ws.ROOMS, "ROOMS", "__version__", "fold_", "select"}


def test_the_import_rules_name_every_room():
    names = {f"weightsmith.{room}" for room in ws.ROOMS}
    (floors,) = (rule for rule in RULES if rule["type"] == "layers" and "containers" not in rule)
    assert names in [set(layer.split(" | ")) for layer in floors["layers"]]
    lab = next(rule for rule in RULES if rule.get("source_modules") == ["weightsmith.lab"])
    assert names <= set(lab["forbidden_modules"])


def test_a_verb_that_changes_a_model_returns_it_or_a_report_that_holds_it():
    for room in ws.ROOMS:
        face = getattr(ws, room)
        for name in (name for name in face.__all__ if name.endswith("_")):
            verb = getattr(face, name)
            hints, arguments = get_type_hints(verb), list(inspect.signature(verb).parameters)
            first, returned = hints[arguments[0]], hints["return"]
            if arguments[0] in ("module", "head", "w"):
                continue  # the floor below the verbs: one module or tensor of a model
            assert arguments[0] == "model", f"{room}.{name}: the model is the first argument"
            holds = returned is first or "model" in get_type_hints(returned)
            assert holds, f"{room}.{name} must return its model, or a report with .model, not {returned}"


def test_a_private_module_is_imported_in_its_own_room_only():
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        importer = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    room, private, _ = name.partition("._")
                    if private and room.startswith("weightsmith.") and not importer.startswith(f"{room}."):
                        found.add(name)
    assert not found
