"""What a page says beside the verdicts: cost, teachers, settings, what was not measured, how to reproduce."""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from remos_hf.evaluation.measures import rate_of
from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import Table
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, NOTHING, REDUCED, REMOVED, Verdict
from remos_hf.judging.words import percent

_PARTS = ("profile", "choose", "reset", "train", "measure")


@dataclass(frozen=True)
class Mark:
    """How a verdict is told from others at a glance; never by colour alone.

    Attributes:
        name: Of its style.
        sign: One letter.
        means: What the sign means.
    """

    name: str
    sign: str
    means: str


UNSAID = Mark("unsaid", "?", CANNOT)
_REDUCED, _NOT = ("reduced", "\N{DOWNWARDS ARROW}"), ("not", "\N{EN DASH}")
_MARKS = {REMOVED: _REDUCED, REDUCED: _REDUCED, NOTHING: _NOT, NOT_SHOWN: _NOT}


def mark_of(told: Verdict) -> Mark:
    """Give the mark of a verdict."""
    return UNSAID if told.kind == CANNOT else Mark(*_MARKS.get(told.kind, ("inherited", "!")), told.kind)


def unmeasured_told(report: DefectReport, told: Sequence[Verdict], maps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the report and the page do not hold."""
    said = [f"{task}: {what}." for task, what in report.unfinished().items()]
    said += [line for task, audit in report.settings.get("audits", {}).items() for line in _left_out(task, audit)]
    rows = [(one.section, row) for one in told for row in one.section.rows]

    def listed(what: str, held: list[str]) -> None:
        if held:
            more = f" and {len(held) - 6} more" if len(held) > 6 else ""
            said.append(f"{what}: {', '.join(held[:6])}{more}.")

    sections = [one.section for one in told]
    listed(
        "Plain fine-tuning, so whether there is anything to reduce, of",
        [section.title for section in sections if section.plain is None],
    )
    listed("A benign floor of", [f"{of.title}, {row['student']}" for of, row in rows if row["floor"] is None])
    without = [f"{of.title}, {row['student']}" for of, row in rows if row["dir"].value is None]
    listed("A DIR, for want of samples that could show the defect, of", without)
    still = [section.title for section in sections if not any(row["reactivation"] for row in section.rows)]
    listed("Re-activation of", still)
    listed(
        "Dev accuracy, so rules at equal accuracy, of", [section.title for section in sections if not section.chosen]
    )
    listed("More than one seed of", [f"{of.title}, {row['student']}" for of, row in rows if row["seeds"] == 1])
    if not report.anatomies:
        said.append(
            "What students are made of (share kept, magnitudes, changes of weights, coverage, training curves)."
        )
    if not maps:
        said.append("Where models look (activation maps, Grad-CAM).")
    said.append("Triggers, inputs and teachers other than those in the settings.")
    return said


def _left_out(task: str, audit: Mapping[str, Any]) -> Iterator[str]:
    """Say which samples were not drawn, and why a given student's teacher was not measured."""
    of = f" ({task})" if task else ""
    parts = [*(audit.get("samples") or {}).values()]
    used, held = Counter(), {part["from"]: part["of"] for part in parts}
    for part in parts:
        used[part["from"]] += part["samples"]
    cut = [f"{held[one] - used[one]:,} of {held[one]:,} of {one}" for one in held if used[one] < held[one]]
    if cut:
        yield f"Samples that were not used{of}: {'; '.join(cut)}."
    if audit.get("teacher_unmeasured"):
        yield f"The teacher itself{of}: {audit['teacher_unmeasured']}."


def reproduction(report: DefectReport, source: str, page: Path, title: str | None) -> list[dict[str, str]]:
    """Say by which commands the numbers and the page come again.

    Args:
        report: The report.
        source: Name of its JSON.
        page: The page.
        title: That the page was given, if it was.
    """
    commands = [audit.get("command") for audit in report.settings.get("audits", {}).values() if isinstance(audit, dict)]
    commands = [str(one) for one in (report.settings.get("command"), *commands) if one]
    numbers = (
        "The numbers come from:"
        if commands
        else (
            "The report does not say the command that made it. All that decided its numbers, data by hashes and seeds "
            "included, is under Settings: an audit with the same settings gives the same numbers on the same versions."
        )
    )
    again = ["remos", "report", source]
    again += ["--output", page.name] if Path(source).with_suffix(".html").name != page.name else []
    again += ["--title", title] if title else []
    return [
        {"text": numbers, "code": "\n".join(dict.fromkeys(commands))},
        {"text": "This page is rendered from the report's JSON alone:", "code": shlex.join(again)},
    ]


def cost_tables(report: DefectReport) -> list[Table]:
    """Average the seconds that were recorded, by task and student; those of a student in several records count once."""
    held: dict[tuple[str, str], set[tuple[Any, ...]]] = {}
    for record in report.records:
        seconds = (record.get("made") or {}).get("seconds") or {}
        if seconds:
            times = (record["seed"], *sorted(seconds.items()))
            held.setdefault((record.get("task") or "", record["student"]), set()).add(times)
    found = {name for timed in held.values() for one in timed for name, _ in one[1:]}
    parts = [*(part for part in _PARTS if part in found), *sorted(found - set(_PARTS))]
    tables = []
    for task in dict.fromkeys(task for task, _ in held):
        lines = []
        for (of, student), timed in held.items():
            if of == task:
                every = [dict(one[1:]) for one in timed]
                cells = [[one[part] for one in every if part in one] for part in parts]
                total = fmean(sum(one.values()) for one in every)
                means = [f"{fmean(cell):.1f}" if cell else "-" for cell in cells]
                lines.append([student, *means, f"{total:.1f}", str(len(every))])
        caption = f"{task + ': ' if task else ''}seconds a student, on average"
        tables.append(Table(caption, ("student", *parts, "all", "n"), lines))
    return tables


def teachers_table(report: DefectReport) -> Table | None:
    """Give what was measured of the teachers themselves; None if nothing was."""
    lines = []
    for task, teachers in report.settings.get("teachers", {}).items():
        for name, found in teachers.items():
            shown = "; ".join(
                f"{defect}: {percent(rate_of(rate), interval=True)} (n = {rate['num_samples']})"
                for defect, rate in found.get("dir", {}).items()
            )
            acc, seconds = rate_of(found["acc"]), found.get("seconds")
            made = "-" if seconds is None else f"{seconds:.0f}"
            lines.append([name, task, f"{percent(acc)} (n = {acc.num_samples})", shown or "-", made])
    header = ("teacher and seed", "task", "ACC %", "DIR % [95 % over samples]", "seconds")
    return Table("Teachers, on the students' test samples", header, lines) if lines else None


def settings_told(report: DefectReport) -> list[dict[str, str]]:
    """Give the settings as JSON, by task."""
    audits = report.settings.get("audits", {})
    others = {key: value for key, value in report.settings.items() if key not in ("audits", "teachers")}
    given = [*((name or "Settings", audit) for name, audit in audits.items()), ("Report", others)]
    return [{"title": title, "json": json.dumps(one, indent=2, ensure_ascii=False)} for title, one in given]
