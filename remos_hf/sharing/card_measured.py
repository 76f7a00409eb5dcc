"""What a card says of what was measured: the student's place in a report, its tables and their remarks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from remos_hf.judging.kinds import FASTER, RANDOM
from remos_hf.judging.report import DefectReport
from remos_hf.judging.rows import named_row
from remos_hf.judging.words import by_seed, percent
from remos_hf.sharing.card_text import as_text, counted, markdown_table
from remos_hf.sharing.record import Sidecars

# Two students are as accurate as each other when no more than this share of the samples lies between them.
EQUAL_ACCURACY = 0.01


_HOW_TO_READ = (
    "ACC: share of the test samples that a student gets right. DIR: of the samples right when clean, the share that "
    "fails with the defect exposed (where it aims at a label: that becomes this label). Benign floor: the same share "
    "for a student of a teacher without the defect. Excess: DIR minus the floor. Intervals hold 95 % over n, pairs of "
    'a sample and a seed, and leave out the spread between seeds, which the values in parentheses show. "-": not '
    "measured, or no sample left to count."
)


def chosen_student(
    report: DefectReport, record: Sidecars | None, student: str | None = None, task: str | None = None
) -> tuple[str, str]:
    """Find a recorded student in a report.

    Args:
        report: The report.
        record: How the student came to be.
        student: Its name, if known.
        task: Its task, if known.

    Returns:
        Task and name.

    Raises:
        ValueError: There is no such student or task, several could be meant, or it was made otherwise.
    """
    tables = report.tables()
    tasks = list(dict.fromkeys(one for one, _ in tables))
    if not tasks:
        raise ValueError("The report holds no records. Give the report of a finished measurement, or none.")
    if task is None and len(tasks) > 1:
        raise ValueError(f"The report is of {len(tasks)} tasks, and a student is of one. Give task=, one of {tasks}.")
    task = tasks[0] if task is None else task
    if task not in tasks:
        raise ValueError(f"The report has no task {task!r}. It has {tasks}.")
    made = {row["student"]: row["made"] for (one, _), rows in tables.items() if one == task for row in rows}
    asked = None if record is None else record_part(record, "strategy")
    if student is None:
        # Where it was made at another learning rate, it is a rival by that name.
        alike = [
            name for name, how in made.items() if _alike(how.get("strategy"), asked) and how.get("lr_factor", 1.0) == 1
        ]
        if len(alike) != 1 and len(made) != 1:
            raise ValueError(
                f"{len(alike)} students of the report were made as the record says. Give student=, one of {list(made)}."
            )
        student = alike[0] if alike else next(iter(made))
    if student not in made:
        raise ValueError(f"The report has no student {student!r} of task {task!r}. It has {list(made)}.")
    said = made[student].get("strategy")
    if asked and said and not _alike(said, asked):
        raise ValueError(
            f"The report's student {student!r} was made by {said}, but the record says {asked}. Give the name of the "
            "student that the record is of."
        )
    return task, student


class MeasuredStudent:
    """A student's place in a report: the tables of its task that it is in."""

    def __init__(self, report: DefectReport, record: Sidecars | None, student: str | None, task: str | None) -> None:
        self.report = report
        self.task, self.student = chosen_student(report, record, student, task)
        self.reference = report.settings.get("reference", "finetune")
        of_task = {defect: rows for (one, defect), rows in report.tables().items() if one == self.task}
        self.tables = {defect: rows for defect, rows in of_task.items() if named_row(rows, self.student)}
        self.without_it = [defect for defect in of_task if defect not in self.tables]
        self.not_inheriting = {defect for one, defect in report.not_inheriting() if one == self.task}
        self.settings = report.settings.get("audits", {}).get(self.task) or {}

    def own(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Give the student's row."""
        return named_row(rows, self.student)

    @property
    def verdict(self) -> str:
        """Say in one sentence whether it inherited less, with the counts of defects."""
        if self.student == self.reference:
            return "As plain fine-tuning it is what others are compared with."
        less = [defect for defect, rows in self.tables.items() if self.inherited_less(defect, rows)]
        nothing = [defect for defect in self.tables if defect in self.not_inheriting]
        told = f"Measured on {counted(len(self.tables), 'defect')}, it inherited less of {len(less)}."
        if nothing:
            told += f" Of {len(nothing)}, plain fine-tuning inherits nothing that could be reduced."
        return f"{told} Read the remarks below each table before believing it."

    def inherited_less(self, defect: str, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the student's interval lies below that of plain fine-tuning, where that inherits the defect."""
        plain = named_row(rows, self.reference)
        pair = None if plain is None or defect in self.not_inheriting else _pair(self.own(rows), plain)
        return pair is not None and pair[1].high < pair[2].low


def _alike(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two strategies are the same but for the seed, which differs between the students of a report."""
    if not one or not other:
        return False
    return all(
        json.loads(json.dumps(one.get(key))) == json.loads(json.dumps(other.get(key))) for key in _keys(one, other)
    )


def _keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    # What only one of them names came with a later version.
    return ({*one} & {*other}) - {"seed"} | {"name"}


def measured_section(measured: "MeasuredStudent | None", published: bool) -> str:
    """Render what was measured of the student, or say that nothing was."""
    if measured is None:
        return (
            "Nothing was measured: no defect report was given. This card says how the student was made, and nothing "
            "about what it inherited."
        )
    parts = [_HOW_TO_READ, _which_weights(measured, published)]
    for defect, rows in measured.tables.items():
        title = f"{measured.task}: {defect}" if measured.task else defect
        shown = _shown(rows, measured)
        parts += [f"### {as_text(title)}", _students(shown, measured)]
        parts += [f"**{remark}**" for remark in _remarks(defect, rows, measured)]
    return "\n\n".join(part for part in parts if part)


def _which_weights(measured: "MeasuredStudent", published: bool) -> str:
    seeds = max(measured.own(rows)["seeds"] for rows in measured.tables.values())
    apart = "students" in measured.settings  # of an audit, which makes a poisoned teacher for each backdoor
    if seeds == 1 and not apart:
        return ""
    each = "seed and each implanted defect" if apart else "seed"
    here = "The uploaded weights are at most one of them" if published else "None of them is uploaded"
    return f"A row pools students made alike, one for each {each}. {here}."


def _shown(rows: Sequence[Mapping[str, Any]], measured: "MeasuredStudent") -> list[Mapping[str, Any]]:
    """Plain fine-tuning, its faster rival, random resets, and the student."""
    keep = [row for row in rows if row["student"] == measured.reference]
    keep += [row for row in rows if row["kind"] in (FASTER, RANDOM)]
    own = measured.own(rows)
    return [row for row in keep if row is not own] + [own]


def _students(rows: Sequence[Mapping[str, Any]], measured: "MeasuredStudent") -> str:
    header = ["student", "ACC % (by seed)", "DIR % [95 %] (by seed)", "n", "seeds", "benign floor %", "excess % [95 %]"]
    fooled = any(row["dir_fooled"] for row in rows)
    lines = []
    for row in rows:
        name = as_text(row["student"])
        lines.append(
            [
                f"**{name}** (this student)" if row["student"] == measured.student else name,
                f"{percent(row['acc'])} ({by_seed(row['acc_by_seed'])})",
                f"{percent(row['dir'], interval=True)} ({by_seed(row['dir_by_seed'])})",
                str(row["dir"].num_samples),
                str(row["seeds"]),
                percent(row["floor"]),
                percent(row["excess"], interval=True),
                *([percent(row["dir_fooled"], interval=True)] if fooled else []),
            ]
        )
    return markdown_table([*header, *(["DIR % on what fools the teacher [95 %]"] if fooled else [])], lines)


def _remarks(defect: str, rows: Sequence[Mapping[str, Any]], measured: "MeasuredStudent") -> list[str]:
    """Say what the table does and does not show of the student."""
    own, plain = measured.own(rows), named_row(rows, measured.reference)
    remarks = []
    if plain is None:
        remarks.append("Plain fine-tuning was not measured: whether there was anything to inherit is not known.")
    elif defect in measured.not_inheriting:
        remarks.append(
            "Plain fine-tuning does not inherit this defect: there was nothing to reduce, and no row shows that a "
            "strategy works."
        )
    if own is plain:
        return [*remarks, "This student is plain fine-tuning: nothing was done against inheriting the defect."]
    if own["dir"].value is None:
        return [*remarks, "The student gets no sample right on which the defect could show, so it has no DIR."]
    if plain is not None and defect not in measured.not_inheriting:
        less = measured.inherited_less(defect, rows)
        told = (
            "inherited less of this defect than" if less else "is not shown to have inherited less of this defect than"
        )
        remarks.append(f"The student {told} plain fine-tuning: {_against(own, plain)}.")
    if plain is not None and plain["acc"] and own["acc"]:
        lost = 100 * (plain["acc"].value - own["acc"].value)
        remarks.append(
            f"Its ACC is {abs(lost):.1f} points {'below' if lost > 0 else 'above'} that of plain fine-tuning."
        )
    if own["kind"] != RANDOM:
        remarks.append(_rival("a random reset", [row for row in rows if row["kind"] == RANDOM], own))
    if own["kind"] != FASTER:
        rivals = [row for row in rows if row["kind"] == FASTER]
        remarks.append(_rival("plain fine-tuning at a higher learning rate", rivals, own))
    return remarks


def _rival(kind: str, rivals: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """Compare with the best rival that is at least as accurate; only as accurate a one is beaten at equal accuracy."""
    name = f"{kind[0].upper()}{kind[1:]}"
    if not rivals:
        return f"{name} was not measured: whether it would have done the same is not known."
    points = f"{100 * EQUAL_ACCURACY:g} point"
    level = own["acc"].value - EQUAL_ACCURACY
    able = [row for row in rivals if row["acc"].value >= level - 1e-9 and _pair(own, row) is not None]
    if not able:
        return (
            f"No {kind.removeprefix('a ')} measured here is as accurate as the student (within {points}): there is no "
            "comparison at equal accuracy."
        )
    best = min(able, key=lambda row: _pair(own, row)[2].value)
    if _pair(own, best)[1].high >= _pair(own, best)[2].low:
        return (
            f"The student is NOT shown to have inherited less than {kind} at the same accuracy or a better one: "
            f"{_told_with_accuracy(own, best)}."
        )
    # Less of the defect at less accuracy is no merit: giving up more of the teacher does that by any rule.
    equal = [row for row in able if row["acc"].value <= own["acc"].value + EQUAL_ACCURACY + 1e-9]
    if equal:
        best = min(equal, key=lambda row: _pair(own, row)[2].value)
        return f"At equal accuracy the student inherited less than {kind}: {_told_with_accuracy(own, best)}."
    closest = min(able, key=lambda row: row["acc"].value)
    return (
        f"Every {kind.removeprefix('a ')} measured here is more accurate than the student by over {points}; the "
        f"closest: {_told_with_accuracy(own, closest)}. There is no comparison at equal accuracy: "
        "whether one that costs as much accuracy would inherit as little is not known."
    )


def _told_with_accuracy(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    mine, its = (percent(row["acc"]) for row in (own, other))
    return f"{_against(own, other)}; ACC {mine} against {its}"


def _pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Give the same figure of both: the excess where both have one, or else the DIR."""
    for key, name in (("excess", "excess DIR"), ("dir", "DIR")):
        figures = one[key], other[key]
        if all(figure is not None and figure.value is not None for figure in figures):
            return name, *figures
    return None


def _against(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    pair = _pair(own, other)
    if pair is None:
        return "the other has no DIR"
    mine, its = (percent(figure, interval=True) for figure in pair[1:])
    return f"{pair[0]} {mine} against {its} of {as_text(other['student'])}, in %"


def record_part(record: Sidecars, name: str) -> Mapping[str, Any]:
    """Give a part of a record, empty where it is none."""
    found = record.config.get(name)
    return found if isinstance(found, Mapping) else {}
