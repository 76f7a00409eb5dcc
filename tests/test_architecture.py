"""The house rules that a machine can check. Reads source text only: no import of remos_hf, no torch."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "remos_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each room may import from the rooms named before it, and from itself. Never from a later one.
FLOORS = [
    {"errors"},
    {"layers", "activations", "fields", "perturbation", "randomness", "whole"},
    {"adapters"},
    {"profiling"},
    {"slicing"},
    {"scanning"},
    {"defects", "strategies"},  # neighbours on one floor do not know each other
    {"evaluation"},
    {"judging"},
    {"showing"},
    {"sharing"},
    {"training"},
    {"auditing", "applications"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def parsed(module: Path) -> ast.AST:
    return ast.parse(module.read_text())


def room(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else "__init__"


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full, from remos_hf..."
            found.append((node.module, node))
    return [(name, node) for name, node in found if name == "remos_hf" or name.startswith("remos_hf.")]


@pytest.fixture(params=MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def module(request):
    return request.param


def test_imports_go_down(module):
    here = room(".".join(module.relative_to(ROOT).with_suffix("").parts))
    if here == "__init__":
        return  # the front door may import every room
    assert here in FLOOR_OF, f"{here} is not on any floor: add it to FLOORS"
    for name, node in imports(parsed(module)):
        there = room(name)
        assert there != "__init__", f"{module}:{node.lineno}: import from the module that defines the name"
        assert there == here or FLOOR_OF[there] < FLOOR_OF[here], (
            f"{module}:{node.lineno}: {here} must not import {there}"
        )


def test_no_import_of_ours_is_hidden_in_a_function(module):
    for function in ast.walk(parsed(module)):
        if isinstance(function, ast.FunctionDef):
            assert not imports(function), f"{module}:{function.lineno}: {function.name} hides an import (a cycle?)"


def test_only_activations_registers_hooks(module):
    if module.name != "activations.py":
        assert "register_forward" not in module.read_text() and "register_full_backward" not in module.read_text()


def test_no_import_of_ours_is_hidden_in_a_string(module):
    here = str(module.relative_to(PACKAGE))
    if here not in {"__init__.py", "cli/commands.py"}:
        assert 'import_module("remos_hf' not in module.read_text(), f"{here} walks around the floors"


def test_a_module_can_be_known_whole(module):
    lines = module.read_text().count("\n")
    assert lines <= 500, f"{module.relative_to(ROOT)} has {lines} lines: which of its ideas wants a module of its own?"


def test_no_dumping_ground(module):
    assert module.stem not in {"utils", "util", "helpers", "common", "misc", "tools", "other"}


def test_every_module_has_its_test(module):
    if module.name == "__init__.py":
        return
    mirror = ROOT / "tests" / module.relative_to(PACKAGE).parent / f"test_{module.name}"
    assert mirror.exists(), f"{module} has no {mirror.relative_to(ROOT)}"


def test_what_the_oldest_environment_leaves_out_is_there():
    listed = (ROOT / "Makefile").read_text().partition("--ignore=tests/,")[2].partition(")")[0]
    missing = [name for name in listed.replace("\\", "").split() if not (ROOT / "tests" / name).exists()]
    assert listed and not missing
