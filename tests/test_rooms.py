"""One tuple names the folders of techniques; everything that repeats it is held to it here."""

import ast
import tomllib
from pathlib import Path

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
    (floors,) = (rule for rule in RULES if rule["type"] == "layers")
    assert names in [set(layer.split(" | ")) for layer in floors["layers"]]
    lab = next(rule for rule in RULES if rule.get("source_modules") == ["weightsmith.lab"])
    assert names <= set(lab["forbidden_modules"])
