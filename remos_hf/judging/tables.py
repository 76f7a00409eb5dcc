"""Rows as cells of text, for pages, cards and Markdown alike."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remos_hf.evaluation.over_seeds import SeedRate
from remos_hf.evaluation.reactivation import samples_needed
from remos_hf.judging.rows import Choice, Row, Section
from remos_hf.judging.words import by_seed, percent

# A defect is back when it shows on this share of the samples.
BACK = 0.5


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        caption: What the table shows.
        header: Names of the columns.
        lines: Cells, row by row; the first of a row names it.
    """

    caption: str
    header: tuple[str, ...]
    lines: list[list[str]]


def tables_of(section: Section) -> list[Table]:
    """Give all tables of a section: the students, rules at equal accuracy, re-activation."""
    tables = (students_table(section), equal_accuracy_table(section.chosen), reactivation_table(section.rows))
    return [table for table in tables if table is not None]


def markdown_of(table: Table) -> list[str]:
    """Write a table as lines of markdown; no name in it opens a cell, a line or a tag."""
    rule = ["---", *("---:" for _ in table.header[1:])]
    lines = [[_cell(cell) for cell in line] for line in (table.header, *table.lines)]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def sentence_of(text: str) -> str:
    """Write a sentence as markdown: a name in it opens no tag, no link and no other paragraph."""
    text = "".join(char if char.isprintable() or char == "\N{NO-BREAK SPACE}" else " " for char in text)
    text = re.sub(" +", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\*])|(?<=\])(?=[\[(])", lambda found: f"\\{found[0]}", text)


def _cell(text: str) -> str:
    text = "".join(char if char.isprintable() else " " for char in text)
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`\[\]*])", r"\\\1", text) if re.search(r"[A-Za-z\\|`*]", text) else text


def students_table(section: Section) -> Table:
    """Put the teacher's row and the students' into cells."""
    rows = [row for row in (section.teacher, section.clean_teacher) if row is not None]
    names = ["teacher", "the same teacher, never poisoned"][: len(rows)]
    fooled = any(row["dir_fooled"] for row in section.rows)
    header = (
        "student",
        "ACC % (by seed)",
        "DIR % [95 %] (by seed)",
        "seeds",
        "n",
        "benign floor %",
        "excess DIR [95 %]",
    )
    header += ("ACC − plain [95 %]", "rACC", "rDIR", "squares reset %")
    header += ("DIR % on what fools the teacher [95 %] (n)",) if fooled else ()
    lines = [
        _line(name, row, fooled=fooled)
        for name, row in [*zip(names, rows, strict=True), *((row["student"], row) for row in section.rows)]
    ]
    return Table("Students, below the teacher that they were started from", header, lines)


def _line(name: str, row: Row, *, fooled: bool) -> list[str]:
    relative = [row["relative_acc"], row["relative_dir"]]
    return [
        name,
        f"{percent(row['acc'], interval=True)} ({by_seed(row['acc_by_seed'])})",
        f"{percent(row['dir'], interval=True)} ({by_seed(row['dir_by_seed'])})",
        str(row["seeds"]),
        str(row["dir"].samples_of_a_seed),
        percent(row["floor"]),
        percent(row["excess"], interval=True),
        percent(row["against_plain"]["acc"], interval=True),
        *("-" if one is None or one.value is None else f"{one.value:.2f}" for one in relative),
        _share_reset(row),
        *([_with_count(row["dir_fooled"])] if fooled else []),
    ]


def _with_count(rate: SeedRate | None) -> str:
    return "-" if rate is None else f"{percent(rate, interval=True)} ({rate.samples_of_a_seed})"


def _share_reset(row: Mapping[str, Any]) -> str:
    return "-" if row["squares_reset"] is None else f"{100 * row['squares_reset']:.1f}"


def equal_accuracy_table(chosen: Sequence[Choice]) -> Table | None:
    """Put what each rule reaches within each budget into cells; None if nothing was compared."""
    lines = []
    for choice in chosen:
        best, cost = choice.row, f"{100 * choice.budget:g}"
        if best is None:
            lines.append([choice.rule, cost, "none", "-", "-", "-", "-"])
            continue
        lines.append(
            [
                choice.rule,
                cost,
                f"{best['made']['slice_ratio']:g}" if "slice_ratio" in best["made"] else "-",
                _share_reset(best),
                percent(best["acc"]),
                percent(best["dir"], interval=True),
                percent(best["excess"], interval=True),
            ]
        )
    header = (
        "rule",
        "dev ACC may fall by",
        "slice ratio",
        "squares reset %",
        "test ACC %",
        "DIR % [95 %]",
        "excess [95 %]",
    )
    caption = "Rules at equal accuracy (ratio chosen on clean dev accuracy alone)"
    return Table(caption, header, lines) if lines else None


def reactivation_table(rows: Sequence[Row]) -> Table | None:
    """Put re-activation into cells; None if none was measured."""
    held = [row for row in rows if row["reactivation"]]
    counts = sorted({count for row in held for count in row["reactivation"]})
    lines = []
    for row in held:
        cells = []
        for count in counts:
            own, twin = row["reactivation"].get(count), row["floor_reactivation"].get(count)
            cells.append(f"{percent(own)} ({percent(twin)})" if twin else percent(own))
        own, twin = _needed(row["reactivation"]), _needed(row["floor_reactivation"])
        lines.append([row["student"], *cells, f"{own} ({twin})" if twin else own])
    caption = (
        "Re-activation: DIR % after re-tuning with so many poisoned samples, and how many bring it to "
        f"{100 * BACK:.0f} % (benign twin in parentheses)"
    )
    return Table(caption, ("student", *map(str, counts), "needed"), lines) if lines else None


def _needed(rates: Mapping[int, SeedRate | None]) -> str:
    held = {count: rate for count, rate in rates.items() if rate is not None and rate.value is not None}
    if not held:
        return "-" if rates else ""
    needed = samples_needed(held, BACK)
    return f"more than {max(held)}" if needed is None else str(needed)
