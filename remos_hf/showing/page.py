"""A report as one HTML file that needs no network: an answer in plain words, tables, pictures, and what is not known.

Every sentence is worked out from the report's numbers. The same pictures are written beside it as PNG files.
"""

import base64
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm.auto import tqdm

from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.measures import rate_of
from remos_hf.judging.judgement import judged
from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import Table, tables_of
from remos_hf.judging.verdicts import Verdict
from remos_hf.judging.words import count_told, percent
from remos_hf.showing.drawings import Drawing, drawings_of
from remos_hf.showing.given_maps import map_of
from remos_hf.whole import replace_file

_TEMPLATE = "page.jinja"
_PARTS = ("profile", "choose", "reset", "train", "measure")
_OPEN = 4  # sections; with more of them they are folded


def write_html(
    report: DefectReport,
    path: str | os.PathLike,
    *,
    pictures: str | os.PathLike | None = None,
    title: str | None = None,
    maps: Sequence[Mapping[str, Any]] = (),
    budgets: Sequence[float] = (0.01, 0.02, 0.04),
) -> Path:
    """Write a report as one HTML file, with its pictures inside it and beside it.

    Shows a bar on a terminal when it takes over two seconds.

    Args:
        report: The report.
        path: The HTML file. Written beside its place and renamed, after all pictures.
        pictures: Folder for the PNG files; `<name of the file>_pictures` beside it if None. Files of the same names are
            replaced, others stay.
        title: Of the page.
        maps: Activation maps or Grad-CAM overlays (`remos_hf.showing.pictures.overlay`), each with "title", "png"
            (its bytes or path), "caption", and if there is one "share", `TriggerShare.to_dict()`.
        budgets: Accuracy that may be lost on the dev split, as shares; the answer is given for the middle one.

    Returns:
        The HTML file.

    Raises:
        TypeError: The report is none; load one with `DefectReport.load`.
        ValueError: The report has no record, there is no budget, or a map is no PNG or lacks its title.
        NonFiniteError: A number is NaN or infinite; names the record.
    """
    _check(report, budgets)
    shown = [map_of(one) for one in maps]
    path = Path(path)
    folder = path.with_name(f"{path.stem}_pictures") if pictures is None else Path(pictures)
    judgement = judged(report, budgets=budgets)
    told = judgement.verdicts
    names = list(dict.fromkeys(one.section.task for one in told))
    drawn = list(drawings_of(report, told, names))
    files = _Files(folder)
    figures: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for number, one in enumerate(tqdm(drawn, desc="pictures", unit="picture", delay=2, disable=None)):
        figures.setdefault(one.place, []).extend(files.figures(one, number))
    for number, one in enumerate(shown, len(drawn)):
        one["figure"] = files.given(one.pop("png"), f"{number:03d}_map", one["alt"], one["caption"])
    pooled = sorted({str(record["seed"]) for record in report.records})
    page = _environment().get_template(_TEMPLATE)
    content = page.render(
        title=title or _default_title(names),
        about=(
            f"{len(report.records):,} records: {count_told(len(names), 'task')}, {count_told(len(told), 'table')}, "
            f"{count_told(len(pooled), 'seed')} ({', '.join(pooled)}). Plain fine-tuning is the student "
            f"“{report.settings.get('reference', 'finetune')}”."
        ),
        tasks=[
            {
                "name": name or "Results",
                "anchor": f"task-{number}",
                "figures": figures.get(("task", name), []),
                "sections": [
                    _shown(one, f"defect-{place}", figures.get(("defect", name, one.section.defect), []))
                    for place, one in enumerate(told)
                    if one.section.task == name
                ],
            }
            for number, name in enumerate(names)
        ],
        several=len(told) > 1,
        open=len(told) <= _OPEN,
        unfinished=[f"{task}: {what}." for task, what in report.unfinished().items()],
        competing=report.competing(),
        answer=[judgement.answer, *judgement.advice, *judgement.limits],
        glance=judgement.glance,
        how_to_read=judgement.how_to_read,
        made=[{"title": place[1], "figures": of} for place, of in figures.items() if place[0] == "made"],
        made_note=_made_note(report, drawn),
        maps=shown,
        costs=_costs(report),
        teachers=_teachers(report),
        settings=_settings(report),
        versions=Table("Packages that the numbers were made with", ("package", "version"), _pairs(report.versions)),
        unmeasured=_unmeasured(report, told, shown),
        reproduce=_reproduce(report, path),
    )
    replace_file(path, content.encode())
    return path


# --- what is said ---


def _shown(told: Verdict, anchor: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    section = told.section
    tables = tables_of(section)
    return {
        "defect": section.defect,
        "title": section.title,
        "anchor": anchor,
        "verdict": told.verdict,
        "sentences": told.sentences,
        "remarks": [],
        "tables": tables,
        "figures": figures,
    }


def _unmeasured(report: DefectReport, told: Sequence[Verdict], maps: Sequence[Mapping[str, Any]]) -> list[str]:
    said = [f"{task}: {what}." for task, what in report.unfinished().items()]
    rows = [(one.section, row) for one in told for row in one.section.rows]

    def listed(what: str, held: list[str]) -> None:
        if held:
            more = f" and {len(held) - 6} more" if len(held) > 6 else ""
            said.append(f"{what}: {', '.join(held[:6])}{more}.")

    titles = [one.section.title for one in told if one.section.plain is None]
    listed("Plain fine-tuning, so whether there is anything to reduce, of", titles)
    listed("A benign floor of", [f"{of.title}, {row['student']}" for of, row in rows if row["floor"] is None])
    without = [f"{of.title}, {row['student']}" for of, row in rows if row["dir"].value is None]
    listed("A DIR, for want of samples that could show the defect, of", without)
    listed(
        "Re-activation of",
        [one.section.title for one in told if not any(row["reactivation"] for row in one.section.rows)],
    )
    listed(
        "Dev accuracy, so rules at equal accuracy, of", [one.section.title for one in told if not one.section.chosen]
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


def _reproduce(report: DefectReport, path: Path) -> list[dict[str, str]]:
    commands = [audit.get("command") for audit in report.settings.get("audits", {}).values() if isinstance(audit, dict)]
    commands = [str(one) for one in (report.settings.get("command"), *commands) if one]
    numbers = (
        "The numbers come from the commands below."
        if commands
        else (
            "The report does not say the command that made it. All that decided its numbers, data by hashes and seeds "
            "included, is under Settings: an audit with the same settings gives the same numbers on the same versions."
        )
    )
    again = (
        "from remos_hf.showing.page import write_html\n"
        "from remos_hf.judging.report import DefectReport\n\n"
        f'write_html(DefectReport.load("{path.stem}.json"), "{path.name}")'
    )
    return [
        {"text": numbers, "code": "\n".join(dict.fromkeys(commands))},
        {"text": "This page is rendered from the report's JSON alone:", "code": again},
    ]


def _costs(report: DefectReport) -> list[Table]:
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


def _teachers(report: DefectReport) -> Table | None:
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
    header = ("teacher and seed", "task", "ACC %", "DIR % [95 %]", "seconds")
    return Table("Teachers, on the students' test samples", header, lines) if lines else None


def _settings(report: DefectReport) -> list[dict[str, str]]:
    audits = report.settings.get("audits", {})
    others = {key: value for key, value in report.settings.items() if key not in ("audits", "teachers")}
    given = [*((name or "Settings", audit) for name, audit in audits.items()), ("Report", others)]
    return [{"title": title, "json": json.dumps(one, indent=2, ensure_ascii=False)} for title, one in given]


# --- what is drawn ---


class _Files:
    """The folder of pictures, and what a page says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(self, drawing: Drawing, number: int) -> Iterator[dict[str, Any]]:
        """Draw pictures and give them to the page."""
        for kind, path in drawing.draw(self.folder / f"{number:03d}_{_slug(drawing.stem)}").items():
            yield _figure(path.read_bytes(), *drawing.words[kind])

    def given(self, png: bytes, stem: str, alt: str, caption: str) -> dict[str, Any]:
        """Write a picture that was made elsewhere."""
        replace_file(self.folder / f"{stem}.png", png)
        return _figure(png, caption, alt)


def _figure(png: bytes, caption: str, alt: str) -> dict[str, Any]:
    width, height = struct.unpack(">II", png[16:24])
    shown = base64.b64encode(png).decode()
    return {"base64": shown, "width": width, "height": height, "caption": caption, "alt": alt}


def _made_note(report: DefectReport, drawn: Sequence[Drawing]) -> str:
    shown = sum("weight_changes" in one.words for one in drawn)
    return (
        f"Measured on {count_told(len(report.anatomies), 'student')}, of the first seed each; {shown} of them are "
        "drawn, those that the answer speaks of first. The numbers of all are in the report's JSON."
    )


# --- words ---


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")[:80]


def _pairs(values: Mapping[str, str]) -> list[list[str]]:
    return [[name, str(value)] for name, value in values.items()]


def _default_title(tasks: Sequence[str]) -> str:
    named = ", ".join(task for task in tasks if task)
    return f"What students inherited: {named}" if named else "What students inherited"


def _environment() -> Environment:
    # Names of tasks, defects and students are anyone's text.
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _check(report: DefectReport, budgets: Sequence[float]) -> None:
    if not isinstance(report, DefectReport):
        raise TypeError(
            f"report is a DefectReport, but got {type(report).__name__}. Read a file by DefectReport.load(path)."
        )
    if not report.records:
        raise ValueError("The report has no record: there is nothing to show. Run the audit, or wait for a student.")
    if not budgets:
        raise ValueError("budgets are shares of accuracy that may be lost, such as (0.02,), but got none.")
    for number, record in enumerate(report.records):
        try:
            json.dumps(record, allow_nan=False)
        except ValueError as error:
            raise NonFiniteError(
                f"Record {number} ({record.get('defect')!r}, student {record.get('student')!r}, seed "
                f"{record.get('seed')}) holds NaN or infinity: measure that student again."
            ) from error
    try:
        json.dumps([report.settings, report.anatomies], allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(
            "The report's settings or anatomies hold NaN or infinity: make the report again."
        ) from error
