"""The templates of pages, and what they do to a table's cells."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from remos_hf.judging.tables import Table


def environment() -> Environment:
    """Give the templates' environment. All text is escaped: names of tasks, defects and students are anyone's."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["together"] = _together
    made.filters["word_columns"] = _word_columns
    return made


def _together(cell: str) -> str:
    """Let no line end inside an interval, a point or the values of few seeds."""
    kept = re.sub(r"\[[^][]*\]|\([-\d., ]{1,24}\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), cell)
    return re.sub(r"(?<=\d) at (?=\d)", "\N{NO-BREAK SPACE}at\N{NO-BREAK SPACE}", kept)


def _word_columns(table: Table) -> set[int]:
    """Give the columns that are read as text, not compared as numbers."""
    numbers = "0123456789-\N{MINUS SIGN}"
    columns = range(1, len(table.header))
    return {one for one in columns if any(len(line[one]) > 12 and line[one][0] not in numbers for line in table.lines)}
