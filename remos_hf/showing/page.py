"""A report as one HTML file that needs no network: the answer, what to do, one table, then everything it stands on.

Every sentence is a verdict's. The same pictures are written beside it as PNG files.
"""

import base64
import io
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, features
from tqdm.auto import tqdm

from remos_hf.judging.judgement import BUDGETS, judged
from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import Table, tables_of
from remos_hf.judging.verdicts import Verdict
from remos_hf.judging.words import TERMS, count_told, defect_name, seeds_told
from remos_hf.showing.drawings import Drawing, drawings_of
from remos_hf.showing.given_maps import map_of
from remos_hf.showing.page_parts import (
    UNSAID,
    cost_tables,
    mark_of,
    reproduction,
    settings_told,
    teachers_table,
    unmeasured_told,
)
from remos_hf.showing.templates import environment
from remos_hf.showing.terms import FirstUses
from remos_hf.whole import replace_file

_TEMPLATE = "page.jinja"
_OPEN = 2  # sections; with more of them they are folded


def write_html(
    report: DefectReport,
    path: str | os.PathLike,
    *,
    pictures: str | os.PathLike | None = None,
    title: str | None = None,
    maps: Sequence[Mapping[str, Any]] = (),
    budgets: Sequence[float] = BUDGETS,
    source: str | None = None,
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
        source: Name of the report's JSON, for the command that renders the page again; the page's own name with
            ".json" if None.

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
    marks = [mark_of(one) for one in told]
    content = (
        environment()
        .get_template(_TEMPLATE)
        .render(
            title=title or _default_title(names),
            about=_about(report, names, told),
            tasks=[_task(name, f"task-{number}", told, figures) for number, name in enumerate(names)],
            open=len(told) <= _OPEN,
            competing=report.competing(),
            judgement=judgement,
            marks=marks if len(marks) == len(judgement.glance.lines) else [],
            signs=list(dict.fromkeys(marks)),
            unsaid=UNSAID,
            first_uses=FirstUses(TERMS).among,
            words_of_table=_words_of,
            made=[{"title": place[1], "figures": of} for place, of in figures.items() if place[0] == "made"],
            made_note=_made_note(report, drawn),
            maps=shown,
            costs=cost_tables(report),
            teachers=teachers_table(report),
            settings=settings_told(report),
            versions=Table("Packages that the numbers were made with", ("package", "version"), _pairs(report.versions)),
            unmeasured=unmeasured_told(report, told, shown),
            reproduce=reproduction(report, source or f"{path.stem}.json", path, title),
        )
    )
    replace_file(path, content.encode())
    return path


# --- what is said ---


def _task(
    name: str, anchor: str, told: Sequence[Verdict], figures: Mapping[tuple[str, ...], list[dict[str, Any]]]
) -> dict[str, Any]:
    sections = [
        _shown(one, f"defect-{place}", figures.get(("defect", name, one.section.defect), []))
        for place, one in enumerate(told)
        if one.section.task == name
    ]
    return {
        "name": name or "Results",
        "anchor": anchor,
        "figures": figures.get(("task", name), []),
        "sections": sections,
        "words": [_words_of(table) for section in sections for table in section["tables"]],
    }


def _shown(told: Verdict, anchor: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    section = told.section
    students, *others = tables_of(section)
    return {
        "name": defect_name(section.defect, section.described),
        "title": section.title,
        "anchor": anchor,
        "mark": mark_of(told),
        "verdict": told.verdict,
        "sentences": told.sentences,
        "tables": [replace(students, caption=f"{section.title}: {_lowered(students.caption)}"), *others],
        "figures": figures,
    }


def _about(report: DefectReport, tasks: Sequence[str], told: Sequence[Verdict]) -> str:
    seeds = {record["seed"] for record in report.records}
    reference = report.settings.get("reference", "finetune")
    plain = any(record["student"] == reference for record in report.records)
    return (
        f"{count_told(len(report.records), 'record')}: {count_told(len(tasks), 'task')}, "
        f"{count_told(len(told), 'table')}, {seeds_told(seeds)}. "
        + (f"Plain fine-tuning is the student “{reference}”." if plain else "Plain fine-tuning was not measured.")
    )


def _made_note(report: DefectReport, drawn: Sequence[Drawing]) -> str:
    shown = sum("weight_changes" in one.words for one in drawn)
    return (
        f"Measured on {count_told(len(report.anatomies), 'student')}, of the first seed each; {shown} of them are "
        "drawn. The numbers of all are in the report's JSON."
    )


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _words_of(table: Table) -> str:
    return "\n".join((table.caption, *table.header))


# --- pictures ---


class _Files:
    """The folder of pictures, and what a page says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(self, drawing: Drawing, number: int) -> Iterator[dict[str, Any]]:
        """Draw pictures and give them to the page."""
        for kind, path in drawing.draw(self.folder / f"{number:03d}_{_slug(drawing.stem)}").items():
            yield _figure(_lighter(path.read_bytes()), *drawing.words[kind])

    def given(self, png: bytes, stem: str, alt: str, caption: str) -> dict[str, Any]:
        """Write a picture that was made elsewhere."""
        replace_file(self.folder / f"{stem}.png", png)
        width, height = struct.unpack(">II", png[16:24])
        return _figure(("image/png", png, (width, height)), caption, alt)


def _lighter(png: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Pack a drawing closer, pixel for pixel the same, where this Pillow can."""
    with Image.open(io.BytesIO(png)) as picture:
        content, size = io.BytesIO(), picture.size
        if not features.check("webp"):
            return "image/png", png, size
        picture.convert("RGB").save(content, "webp", lossless=True, method=1, quality=50)
    return "image/webp", content.getvalue(), size


def _figure(picture: tuple[str, bytes, tuple[int, int]], caption: str, alt: str) -> dict[str, Any]:
    kind, content, (width, height) = picture
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return {"source": source, "width": width, "height": height, "caption": caption, "alt": alt}


# --- words ---


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")[:80]


def _pairs(values: Mapping[str, str]) -> list[list[str]]:
    return [[name, str(value)] for name, value in values.items()]


def _default_title(tasks: Sequence[str]) -> str:
    named = ", ".join(task for task in tasks if task)
    return f"What students inherited: {named}" if named else "What students inherited"


def _check(report: DefectReport, budgets: Sequence[float]) -> None:
    if not isinstance(report, DefectReport):
        raise TypeError(
            f"report is a DefectReport, but got {type(report).__name__}. Read a file by DefectReport.load(path)."
        )
    if not report.records:
        raise ValueError("The report has no record: there is nothing to show. Run the audit, or wait for a student.")
    if not budgets:
        raise ValueError("budgets are shares of accuracy that may be lost, such as (0.02,), but got none.")
    report.check_finite()
