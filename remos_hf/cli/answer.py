"""What a report comes to, on a terminal: the answer, why it cannot be said if so, and the one table that holds it."""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from remos_hf.judging.judgement import BUDGETS, judged
from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import Table
from remos_hf.judging.verdicts import CANNOT

NOTHING_SAID = 3  # the exit status of what is done, while nothing can be said of it
_COLUMNS = (120, 40)  # where there is no terminal


def answered(report: DefectReport) -> tuple[dict[str, Any], str, list[int]]:
    """Judge a report for a terminal.

    Args:
        report: What was measured.

    Returns:
        What is said as JSON values and as text, and the exit status: none, or `NOTHING_SAID`.
    """
    said = judged(report, budgets=BUDGETS)
    unsaid = {one.section.title: one.sentences for one in said.verdicts if one.kind == CANNOT}
    told = {
        "answer": said.answer,
        "advice": said.advice,
        "can_be_said": said.can_be_said,
        "cannot_be_said": unsaid,
        "results": [
            {"task": one.section.task, "defect": one.section.defect, "student": row["student"], "seeds": row["seeds"]}
            | {name: None if row[name] is None else asdict(row[name]) for name in ("acc", "dir", "floor")}
            for one in said.verdicts
            for row in one.section.rows
        ],
    }
    # Of weights that were given all is told: what an answer of one line leaves out may turn it around.
    given = {one.section.title: one.sentences for one in said.verdicts if one.section.given and one.kind != CANNOT}
    why = [f"{title}: {' '.join(parts)}" for title, parts in {**unsaid, **given}.items()]
    return told, in_lines([said.answer, *said.advice, *why], said.glance), [] if said.can_be_said else [NOTHING_SAID]


def in_lines(paragraphs: Iterable[str], table: Table) -> str:
    """Write paragraphs, and the table that they stand on, as wide as the terminal."""
    width = shutil.get_terminal_size(_COLUMNS).columns
    return "\n".join([*_wrapped(paragraphs, width), "", *_lines_of(table, width)])


def _wrapped(paragraphs: Iterable[str], width: int) -> list[str]:
    return [line for one in dict.fromkeys(paragraphs) for line in textwrap.wrap(one, width)]


def _lines_of(table: Table, width: int) -> list[str]:
    """Write a table in columns, or where they are too many for the terminal, each line of it as a block."""
    rows = [list(table.header), *table.lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * len(widths) <= width:
        lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [f"{table.caption}:", *lines]
    lines = [f"{table.caption}:"]
    for first, *cells in table.lines:
        lines.append(first)
        lines += [f"  {name}: {cell}" for name, cell in zip(table.header[1:], cells, strict=True) if cell != "-"]
    return lines
