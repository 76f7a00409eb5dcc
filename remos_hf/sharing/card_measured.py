"""What a card says of what was measured: of the very weights that it is for, or of others."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from remos_hf.judging.judgement import judged
from remos_hf.judging.kinds import FASTER, RANDOM
from remos_hf.judging.one_student import OfStudent, answer_of, follows_of, of_student
from remos_hf.judging.report import DefectReport
from remos_hf.judging.rows import GIVEN, named_row
from remos_hf.judging.tables import Table, students_table
from remos_hf.judging.verdicts import Verdict
from remos_hf.judging.words import HOW_INTERVALS_ARE_MADE, TERMS, capitalised, percent
from remos_hf.sharing.card_text import as_sentences, as_text, counted, markdown_table
from remos_hf.sharing.defect_kinds import defect_kind
from remos_hf.sharing.record import Sidecars

_UNMEASURED = (
    "What it inherited is not known: until it is measured (`remos audit --student`), take it to have every defect that "
    "its teacher has."
)
_NO_WEIGHTS = "It tells of a way to make students, and not of any one student's weights."


class Tie(Enum):
    """How the rows of a report belong to the weights that a card is for."""

    THESE = "measured of these weights"
    OTHERS = "measured of other weights"
    ALIKE = "measured of students that an audit made the same way"
    UNKNOWN = "measured of weights that the report does not name"


class MeasuredStudent:
    """A student's place in a report.

    Args:
        report: The report.
        record: How the student came to be.
        student: Its name in the report, if known.
        task: Its task, if known.
        weights: The hash of the weights that the card is for; rows that name it are of them, and no others.

    Attributes:
        task: The report's task.
        student: The report's name of the student.
        tie: Whether its rows are of these weights.
        of_defects: What is said of it, by the report's name of a defect; only those that it was measured on.
        without_it: Defects of the report that it was not measured on.
        settings: The task's settings.

    Raises:
        ValueError: The report does not hold the student, or it is not clear which one is meant.
    """

    def __init__(
        self,
        report: DefectReport,
        record: Sidecars | None,
        student: str | None,
        task: str | None,
        weights: str | None,
    ) -> None:
        own = _records_of(report, weights, student, task)
        if own:
            self.task, self.student = own[0].get("task") or "", own[0]["student"]
        else:
            self.task, self.student = chosen_student(report, record, student, task)
        # Rivals of the same seed alone: these weights are of one, and are not pooled with others of their name.
        seeds = {one["seed"] for one in own}
        of_task = [
            one
            for one in report.records
            if (one.get("task") or "") == self.task and (not own or one["seed"] in seeds) and _belongs(one, own)
        ]
        self.report = DefectReport(of_task, report.settings, report.versions)
        self.records = own or [one for one in of_task if one["student"] == self.student]
        self.settings = (report.settings.get("audits") or {}).get(self.task) or {}
        self.tie = self._tie(bool(own))
        verdicts = {one.section.defect: one for one in judged(self.report).verdicts}
        self.verdicts = {name: one for name, one in verdicts.items() if named_row(one.section.rows, self.student)}
        self.of_defects = {name: of_student(one, self.student) for name, one in self.verdicts.items()}
        self.without_it = [name for name in verdicts if name not in self.verdicts]

    def _tie(self, own: bool) -> Tie:
        if own:
            return Tie.THESE
        if any(one.get(GIVEN) for one in self.records):
            return Tie.OTHERS
        return Tie.ALIKE if "students" in self.settings else Tie.UNKNOWN

    @property
    def learning_rate_factor(self) -> float:
        """How many times plain fine-tuning's learning rate it was made at, as the report says."""
        return (self.records[0].get("made") or {}).get("lr_factor", 1.0)

    @property
    def told(self) -> list[OfStudent]:
        """What is said of each defect."""
        return list(self.of_defects.values())


def chosen_student(
    report: DefectReport, record: Sidecars | None, student: str | None = None, task: str | None = None
) -> tuple[str, str]:
    """Find a recorded student in a report, by how it was made.

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


def _records_of(
    report: DefectReport, weights: str | None, student: str | None, task: str | None
) -> list[Mapping[str, Any]]:
    """Give the records that name these weights; of several tasks or names, those asked for, or of the first."""
    own = [one for one in report.records if weights and (one.get(GIVEN) or {}).get("weights") == weights]
    if not own:
        return []
    places = list(dict.fromkeys((one.get("task") or "", one["student"]) for one in own))
    asked = [place for place in places if task in (None, place[0]) and student in (None, place[1])]
    if not asked:
        names = ", ".join(f"{name!r} of task {where!r}" for where, name in places)
        raise ValueError(f"In the report these weights are {names}, and not {student!r} of task {task!r}.")
    return [one for one in own if (one.get("task") or "", one["student"]) == asked[0]]


def _belongs(record: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a record is one of these weights, or of another student."""
    return not own or record["student"] != own[0]["student"] or record in own


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


def head_of(measured: MeasuredStudent | None, weights: str | None, *, published: bool) -> tuple[str, str]:
    """Say what was measured of these weights, or that nothing was; and what follows.

    Args:
        measured: The student's place in a report; None if there is no report.
        weights: The hash of the weights that the card is for, if known.
        published: Whether they are in the repository.
    """
    if measured is None:
        return "Nothing was measured of these weights: no report of their defects was given.", _UNMEASURED
    if measured.tie is Tie.THESE:
        accuracy = percent(_own(measured)["acc"])
        said = answer_of(measured.told, "these weights")
        first = f"Measured of these weights (SHA-256 {weights[:12]}…): {accuracy} % accuracy. {said}"
        return as_sentences(first), as_sentences(follows_of(measured.told))
    none = "Nothing was measured of these weights." if published else "No weights come with this card."
    if measured.tie is Tie.OTHERS:
        return f"{none} The report beside them is of other weights.", _UNMEASURED
    if measured.tie is Tie.UNKNOWN:
        return f"{none} The report beside them does not say which weights its rows are of.", _UNMEASURED
    said = answer_of(measured.told, "students made this way")
    first = f"{none} The report is of {_made_alike(measured)}. {said}"
    return as_sentences(first), _UNMEASURED if published else _NO_WEIGHTS


def _made_alike(measured: MeasuredStudent) -> str:
    kinds = {_is_found(one) for one in measured.verdicts.values()}
    if kinds == {True}:
        return "students that an audit made the same way from a teacher, on which the defects were found"
    beside = " (for a defect that was found rather than implanted: from the teacher as it is)" if True in kinds else ""
    return f"students made the same way from a teacher that we poisoned{beside}"


def _is_found(verdict: Verdict) -> bool:
    kind = defect_kind(verdict.section.described)
    return kind.found if kind is not None else not verdict.section.implanted


def _own(measured: MeasuredStudent) -> Mapping[str, Any]:
    first = next(iter(measured.verdicts.values()))
    return named_row(first.section.rows, measured.student)


def measured_section(measured: MeasuredStudent | None) -> str:
    """Render what was measured of the student or of its like, or say that nothing was."""
    if measured is None:
        return "Nothing was measured. This card says how the student was made, and nothing about what it inherited."
    words = "\n".join(f"- {capitalised(term)}: {TERMS[term]}" for term in ("ACC", "DIR", "benign floor", "excess"))
    parts = [words, HOW_INTERVALS_ARE_MADE, _which(measured)]
    for name, verdict in measured.verdicts.items():
        said = measured.of_defects[name]
        title = f"{measured.task}: {said.defect}" if measured.task else said.defect
        parts += [f"### {as_text(title)}", _table(measured, verdict)]
        parts += [as_sentences(sentence) for sentence in said.sentences]
    return "\n\n".join(parts)


def _which(measured: MeasuredStudent) -> str:
    told = {
        Tie.THESE: "The row in bold is these very weights; the others were measured beside them. Intervals in the "
        "sentences about these weights hold what the test samples leave open, as weights have no seeds.",
        Tie.OTHERS: "**No row is of the weights of this card**: the row in bold is other weights of that name.",
        Tie.UNKNOWN: "**Which weights the rows are of is not recorded**: none is known to be those of this card.",
    }
    if measured.tie is not Tie.ALIKE:
        return told[measured.tie]
    return (
        f"**No row is of the weights of this card.** Rows are {_made_alike(measured)}, one for each seed and each "
        "implanted defect."
    )


def _table(measured: MeasuredStudent, verdict: Verdict) -> str:
    """Show the teacher, plain fine-tuning, its rivals and the student."""
    section = verdict.section
    own = named_row(section.rows, measured.student)
    rivals = [row for row in section.rows if row is section.plain or row["kind"] in (FASTER, RANDOM)]
    rows = [*(row for row in rivals if row is not own), own]
    return _markdown(students_table(replace(section, rows=rows)))


def _markdown(table: Table) -> str:
    *lines, own = [[as_text(cell) if _has_words(cell) else cell for cell in line] for line in table.lines]
    own[0] = f"**{own[0]}**"
    return markdown_table(list(map(as_text, table.header)), [*lines, own])


def _has_words(cell: str) -> bool:
    return not set(cell) <= set("0123456789.,-–−[]() ")


def untested_of(measured: MeasuredStudent) -> Iterator[str]:
    """Name what a report leaves open of the student."""
    if measured.tie is not Tie.THESE:
        yield "these weights themselves"
    for defect in measured.without_it:
        yield f"{as_text(defect)}: in the report, but not measured of this student"
    missing = (measured.report.settings.get("missing") or {}).get(measured.task)
    if missing:
        yield f"{counted(missing, 'student')} of the audit, which is not over: the tables hold what is done"


def record_part(record: Sidecars, name: str) -> Mapping[str, Any]:
    """Give a part of a record, empty where it is none."""
    found = record.config.get(name)
    return found if isinstance(found, Mapping) else {}
