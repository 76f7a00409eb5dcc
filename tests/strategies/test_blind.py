"""No strategy can see an attack: nothing that it is given could carry poisoned data or an attack's success."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

from remos_hf.strategies.base import Strategy
from tests.strategies.test_contract import KINDS

# What a recipe is made of: settings. A file, a data set, a function or a tensor could carry what an attacker did.
SETTINGS = (bool, int, float, str, type(None))
RIVALS = {"Recipe", "DiSec", "SeaM", "Crow", "Relevance"}


def plain(hint):
    """The types that a hint is made of, tuples and choices taken apart."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    inner = typing.get_args(hint)
    return set().union(*map(plain, inner)) if inner else set() if hint is Ellipsis else {hint}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestEveryStrategy:
    def test_its_settings_are_numbers_words_and_choices(self, kind):
        hints = typing.get_type_hints(kind)
        for one in dataclasses.fields(kind):
            assert plain(hints[one.name]) <= {*SETTINGS, Strategy}, f"{kind.__name__}.{one.name} could carry data"
        assert all("path" not in one.name and "data" not in one.name for one in dataclasses.fields(kind))

    def test_it_starts_and_holds_by_the_student_its_data_and_the_teacher_alone(self, kind):
        assert list(inspect.signature(kind.prepare).parameters) == ["self", "student", "data"]
        assert list(inspect.signature(kind.hold).parameters) == ["self", "student", "teacher"]
        assert list(inspect.signature(kind.restart).parameters) == ["self", "student", "data", "relevant_slice"]
        tree = ast.parse(Path(inspect.getfile(kind)).read_text())
        imported = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any(name.startswith(("remos_hf.defects", "remos_hf.evaluation")) for name in imported)

    def test_a_rival_says_so(self, kind):
        if kind.__name__ in RIVALS:
            assert "Uses poisoned data or an attack's success: no." in inspect.getdoc(kind)


def test_all_rivals_were_looked_at():
    assert {kind.__name__ for kind in KINDS} >= RIVALS
