"""The arrows of the house: who may import whom."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "ript_ray": {"ript_ray"},
    "actors": {"actors", "ript_ray"},
    "learner": {"learner", "ript_ray"},
    "cluster": {"cluster", "ript_ray"},
}


def imported_rooms(file: Path) -> set[str]:
    """Top-level packages of this project that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & {*ALLOWED, "launch", "benchmarks"}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        assert imported_rooms(file) <= ALLOWED[room], file


def test_the_domain_does_not_know_ray() -> None:
    for file in (ROOT / "ript_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "ray" for module in modules), file


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = [*ALLOWED, "benchmarks"]
    found = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for room in rooms
        for file in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed) == found
