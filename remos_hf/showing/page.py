"""A report as one HTML file that needs no network: an answer in plain words, tables, pictures, and what is not known.

Every sentence is worked out from the report's numbers. The same pictures are written beside it as PNG files.
"""

import base64
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm.auto import tqdm

from remos_hf.errors import CorruptFileError, NonFiniteError
from remos_hf.evaluation.report import HOW_TO_READ, Choice, DefectReport, Section, Table, percent, rate_of
from remos_hf.showing.pictures import accuracy_against_dir, anatomy_pictures, convergence, reactivation_curve
from remos_hf.whole import replace_file

_TEMPLATE = "page.jinja"
_PNG = b"\x89PNG\r\n\x1a\n"
_PARTS = ("profile", "choose", "reset", "train", "measure")
_OPEN = 4  # sections; with more of them they are folded
_DRAWN = 3  # students of one teacher whose insides are drawn
_DRAWN_IN_ALL = 12
_CURVES = 8  # training curves in one picture


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
    shown = [_map_of(one) for one in maps]
    path = Path(path)
    folder = path.with_name(f"{path.stem}_pictures") if pictures is None else Path(pictures)
    budget = sorted(budgets)[len(budgets) // 2]
    told = [_told(section, budget) for section in report.sections(budgets=budgets)]
    names = list(dict.fromkeys(one.section.task for one in told))
    drawn = list(_drawings(report, told, names))
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
            f"{len(report.records):,} records: {_counted(len(names), 'task')}, {_counted(len(told), 'table')}, "
            f"{_counted(len(pooled), 'seed')} ({', '.join(pooled)}). Plain fine-tuning is the student "
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
        answer=_answer(told, budget),
        glance=_glance(told, budget),
        how_to_read=HOW_TO_READ,
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


@dataclass(frozen=True)
class _Told:
    """What is said of one task and defect.

    Attributes:
        section: Its numbers.
        verdict: In one line.
        kind: Of the verdict, to count by.
        sentences: In full.
        best: The rule that inherits least within the budget, or None.
        rivals: What the random reset and the higher learning rate reach, by name; None where not within the budget.
    """

    section: Section
    verdict: str
    kind: str
    sentences: list[str]
    best: Choice | None = None
    rivals: dict[str, Choice | None] = field(default_factory=dict)


_RANDOM, _FASTER = "the random reset", "the higher learning rate"
_UNKNOWN = "cannot be said"
_NOTHING = "not inherited"
_NO_RULE = "inherited; no rule within the budget"
_AS_PLAIN = "inherited; no rule is below plain fine-tuning"
_BELOW_BOTH = "inherited; less by the best rule than by both rivals"
_NOT_APART = "inherited; less by the best rule, but not apart from a rival"
_LIMITS = (
    "“Less inherited” speaks of the defects and inputs measured here and of no others. It does not say that a "
    "student is free of defects."
)
_ALONE = "inherited; less by the best rule, but a rival is missing"
_BEATEN = "inherited; a rival inherits less than the best rule"


def _told(section: Section, budget: float) -> _Told:
    plain = section.plain
    if plain is None or plain["dir"].value is None:
        why = "plain fine-tuning was not measured" if plain is None else "plain fine-tuning has no DIR"
        said = f"Nothing can be concluded: {why}, so whether there is anything to reduce is not known."
        return _Told(section, f"{_UNKNOWN}: {why}", _UNKNOWN, [said])
    floor = plain["floor"]
    has_floor = floor is not None and floor.value is not None
    first = (
        f"Plain fine-tuning shows the defect on {_rate(plain['dir'])} ({_counted(plain['seeds'], 'seed')}), "
        + (f"a student of a never-poisoned teacher on {_rate(floor)} (the benign floor)." if has_floor else "")
        + ("" if has_floor else "and there is no benign floor: part of it may be errors of its own.")
    )
    if not section.inherits:
        inside = f"the excess over the floor is {percent(plain['excess'], interval=True)} points" if has_floor else ""
        first += f" It does not inherit the defect{': ' + inside if inside else ''}."
        last = "There is nothing to reduce here, and no row below shows that a strategy works."
        return _Told(section, _NOTHING, _NOTHING, [first, last])
    first += " It inherits the defect." if has_floor else ""
    kind, sentences, best, rivals = _compared(section, budget)
    if not has_floor:
        kind = _UNKNOWN
        sentences.append("Without a benign floor nothing can be concluded about what was inherited.")
    verdict = "shown, but no benign floor: how much is inherited cannot be said" if not has_floor else kind
    return _Told(section, verdict, kind, [first, *sentences], best, rivals)


def _compared(section: Section, budget: float) -> tuple[str, list[str], Choice | None, dict[str, Choice | None]]:
    """Say what the best rule reaches within the budget, beside plain fine-tuning, random reset and learning rate."""
    within = f"within {100 * budget:g} points of dev accuracy"
    asked = [choice for choice in section.chosen if choice.budget == budget]
    if not asked:
        return _NO_RULE, ["No rule was compared at equal accuracy: dev accuracy was not measured."], None, {}
    kinds = {choice.rule: _kind_of(choice.rule, section) for choice in asked}
    rules = [choice for choice in asked if kinds[choice.rule] == "rule"]
    able = [choice for choice in rules if choice.row is not None and choice.row["dir"].value is not None]
    rivals = {name: _least([one for one in asked if kinds[one.rule] == name]) for name in (_RANDOM, _FASTER)}
    measured = set(kinds.values())
    if not able:
        sentences = [f"No rule stays {within}: nothing can be concluded about rules at this accuracy."]
        return _NO_RULE, [*sentences, *_rivals_told(rivals, measured, None, within)], None, rivals
    best = _least(able)
    which = "only rule" if len(able) == 1 else f"best of {len(able)} rules"
    sentences = [
        f"The {which} {within} is {_name(best)}: DIR {_rate(best.row['dir'])} at "
        f"{percent(best.row['acc'])} % test accuracy ({_counted(best.row['seeds'], 'seed')}), against "
        f"{percent(section.plain['acc'])} % by plain fine-tuning."
        + (" The best is picked by its DIR on the test samples, which flatters it." if len(able) > 1 else "")
    ]
    excess = best.row["excess"]
    if excess is not None and excess.value is not None and excess.low <= 0:
        sentences.append(
            f"Over its own benign floor it is {percent(excess, interval=True)} points, an interval that holds 0."
        )
    sentences += _rivals_told(rivals, measured, best, within)
    if _against(best, section.plain) != "below":
        sentences.append("Its interval and that of plain fine-tuning overlap, or it is above: nothing was gained here.")
        return _AS_PLAIN, sentences, best, rivals
    against = [_against(best, rival.row) for rival in rivals.values() if rival is not None]
    if "above" in against:
        return _BEATEN, sentences, best, rivals
    if "not apart" in against:
        return _NOT_APART, sentences, best, rivals
    # A rival that was tried and costs more accuracy than allowed is out of the race; one never tried is not.
    return (_BELOW_BOTH if {_RANDOM, _FASTER} <= measured else _ALONE), sentences, best, rivals


def _rivals_told(
    rivals: Mapping[str, Choice | None], measured: set[str], best: Choice | None, within: str
) -> Iterator[str]:
    for name, rival in rivals.items():
        if name not in measured:
            yield f"{_capital(name)} was not measured."
        elif rival is None:
            yield f"{_capital(name)} has no student {within}."
        else:
            reached = f"{_capital(name)} ({_name(rival)}) reaches DIR {_rate(rival.row['dir'])} {within}"
            said = {
                "below": "the best rule inherits less, and the 95 % intervals do not overlap",
                "above": "it inherits less than the best rule, and the 95 % intervals do not overlap",
                "not apart": "the 95 % intervals overlap: the two are not told apart",
            }
            yield f"{reached}: {said[_against(best, rival.row)]}." if best else f"{reached}."


def _kind_of(rule: str, section: Section) -> str:
    """Tell rules from what they are compared with."""
    row = next(one for one in section.rows if one["made"].get("rule", one["student"]) == rule)
    strategy = row["made"].get("strategy") or {}
    if strategy.get("name", "").lower() == "random" or rule.partition(" ")[0].rstrip(",") == "random":
        return _RANDOM
    if strategy.get("name") == "Retrain" or rule == "retrain":
        return "retrain"  # takes nothing from any teacher, so it inherits nothing
    kept = strategy.get("embedding_rows", "keep") == "keep"
    return _FASTER if strategy.get("name") == "Finetune" and kept and row["made"].get("lr_factor", 1) > 1 else "rule"


def _least(choices: Sequence[Choice]) -> Choice | None:
    held = [choice for choice in choices if choice.row is not None and choice.row["dir"].value is not None]
    return min(held, key=lambda choice: choice.row["dir"].value, default=None)


def _against(best: Choice, row: Mapping[str, Any]) -> str:
    mine, other = best.row["dir"], row["dir"]
    return "below" if mine.high < other.low else "above" if mine.low > other.high else "not apart"


def _answer(told: Sequence[_Told], budget: float) -> list[str]:
    if len(told) == 1:
        return [*told[0].sentences, _LIMITS]
    kinds = [one.kind for one in told]
    inherited = [kind for kind in kinds if kind not in (_UNKNOWN, _NOTHING)]
    said = [
        f"Of {len(told)} pairs of a task and a defect, plain fine-tuning inherits the defect in {len(inherited)}, "
        f"does not in {kinds.count(_NOTHING)}, and in {kinds.count(_UNKNOWN)} it cannot be said."
    ]
    if inherited:
        counts = {kind: inherited.count(kind) for kind in dict.fromkeys(inherited)}
        parts = ", ".join(f"“{kind.removeprefix('inherited; ')}” {number}" for kind, number in counts.items())
        said.append(
            f"Verdicts where it is inherited, with at most {100 * budget:g} points of dev accuracy lost: {parts}. The "
            f"rivals are {_RANDOM} and {_FASTER}; a rule is any other way to choose what to reset."
        )
    else:
        said.append(
            "Nothing can be concluded about strategies: there is no pair in which a defect is known to be inherited."
        )
    return [*said, _LIMITS]


def _glance(told: Sequence[_Told], budget: float) -> Table:
    lines = []
    for one in told:
        plain = one.section.plain
        reached = [one.best, one.rivals.get(_RANDOM), one.rivals.get(_FASTER)]
        lines.append(
            [
                one.section.title,
                one.verdict,
                percent(plain["dir"], interval=True) if plain else "-",
                percent(plain["floor"]) if plain else "-",
                str(plain["dir"].num_samples) if plain else "-",
                *("-" if choice is None else percent(choice.row["dir"], interval=True) for choice in reached),
                _name(one.best) if one.best else "-",
            ]
        )
    header = (
        "task: defect",
        "verdict",
        "plain fine-tuning DIR %",
        "floor %",
        "n",
        "best rule DIR %",
        "random reset DIR %",
        "higher learning rate DIR %",
        "best rule",
    )
    return Table(f"At most {100 * budget:g} points of dev accuracy lost; 95 % intervals in brackets", header, lines)


def _shown(told: _Told, anchor: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    section = told.section
    students = Table(f"Students of {section.title}", section.students.header, section.students.lines)
    tables = [students, section.equal_accuracy, section.reactivation]
    return {
        "defect": section.defect,
        "title": section.title,
        "anchor": anchor,
        "verdict": told.verdict,
        "sentences": told.sentences,
        "remarks": section.remarks,
        "tables": [table for table in tables if table is not None],
        "figures": figures,
    }


def _unmeasured(report: DefectReport, told: Sequence[_Told], maps: Sequence[Mapping[str, Any]]) -> list[str]:
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
    listed("Re-activation of", [one.section.title for one in told if one.section.reactivation is None])
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
    said.append(
        "Triggers, inputs and teachers other than those in the settings. The intervals leave out the seeds' spread."
    )
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
        "from remos_hf.evaluation.report import DefectReport\n\n"
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


@dataclass(frozen=True)
class _Drawing:
    """Pictures to be made.

    Attributes:
        place: Where they go: ("task", name), ("defect", task, name) or ("made", title).
        stem: End of their file names.
        draw: Writes them, given a path without its ending; gives them by kind.
        words: Caption and alternative text by kind.
    """

    place: tuple[str, ...]
    stem: str
    draw: Callable[[Path], Mapping[str, Path]]
    words: Mapping[str, tuple[str, str]]


class _Files:
    """The folder of pictures, and what a page says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(self, drawing: _Drawing, number: int) -> Iterator[dict[str, Any]]:
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


def _drawings(report: DefectReport, told: Sequence[_Told], tasks: Sequence[str]) -> Iterator[_Drawing]:
    for task in tasks:
        of = [one for one in told if one.section.task == task]
        if len(of) > 1:
            yield _scatter(report, task, None, of)
        for one in of:
            defect = one.section.defect
            yield _scatter(report, task, defect, [one])
            if any(row["reactivation"] for row in one.section.rows):
                yield _reactivation(report, one)
    yield from _insides(report, told)


def _scatter(report: DefectReport, task: str, defect: str | None, told: Sequence[_Told]) -> _Drawing:
    rows = [row for one in told for row in one.section.rows]
    seeds = {record["seed"] for record in report.records if (record.get("task") or "") == task}
    caption = (
        f"Accuracy against DIR of {told[0].section.title if defect is not None else task or 'all defects'}: "
        f"n = {_span([row['dir'].num_samples for row in rows])} pairs of a sample and a seed for DIR, "
        f"{_span([row['acc'].num_samples for row in rows])} for accuracy; {_seeds(seeds)}. Bars are 95 % "
        "intervals; the grey line is the Pareto front, students that no other beats in accuracy without a higher DIR."
    )
    plain = [f"{one.section.defect}, {_point(one.section.plain)}" for one in told if one.section.plain]
    best = [f"{one.section.defect}, {_point(one.best.row)}" for one in told if one.best]
    alt = "Scatter plot, accuracy up, defect inheritance rate to the right. "
    alt += f"Plain fine-tuning: {'; '.join(plain) or 'not measured'}."
    alt += f" Best rule within the budget: {'; '.join(best)}." if best else ""
    return _Drawing(
        ("task", task) if defect is None else ("defect", task, defect),
        f"accuracy_{task}_{defect or 'all'}",
        lambda stem: {"it": accuracy_against_dir(report, f"{stem}.png", defect, task=task)},
        {"it": (caption, alt)},
    )


def _reactivation(report: DefectReport, told: _Told) -> _Drawing:
    section = told.section
    records = [
        one for one in report.records if (one.get("task") or "", one["defect"]) == (section.task, section.defect)
    ]
    held = [row for row in section.rows if row["reactivation"]]
    sizes = [rate.num_samples for row in held for rate in row["reactivation"].values() if rate is not None]
    seeds = {record["seed"] for record in records if record.get("reactivation")}
    caption = (
        f"Re-activation of {section.title}: DIR after re-tuning with so many poisoned samples; n = {_span(sizes)} "
        f"samples a point, {_counted(len(held), 'student')}, {_seeds(seeds)}. Dashed: the benign twin."
    )
    ends = [f"{row['student']} {percent(row['reactivation'][max(row['reactivation'])])} %" for row in held]
    alt = f"Lines of defect inheritance rate against poisoned samples. At the most samples: {', '.join(ends)}."
    return _Drawing(
        ("defect", section.task, section.defect),
        f"reactivation_{section.task}_{section.defect}",
        lambda stem: {"it": reactivation_curve(records, f"{stem}.png")},
        {"it": (caption, alt)},
    )


def _insides(report: DefectReport, told: Sequence[_Told]) -> Iterator[_Drawing]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in report.anatomies:
        groups.setdefault((one.get("task") or "", one["teacher"]), []).append(one)
    left = _DRAWN_IN_ALL
    for task, teacher in sorted(groups, key=lambda group: group[1] == "clean"):  # benign twins come last
        of = groups[task, teacher]
        title = f"{task + ': ' if task else ''}students of the teacher “{teacher}”"
        for one in _chosen_of(of, report, told)[:left]:
            left -= 1
            yield _inside(one, title)
        logged = {one["student"]: one["anatomy"]["history"] for one in of if "loss" in one["anatomy"]["history"]}
        logged = dict(list(logged.items())[:_CURVES])
        if logged and left > 0:
            yield _training(logged, of, title)


def _chosen_of(
    group: Sequence[Mapping[str, Any]], report: DefectReport, told: Sequence[_Told]
) -> list[Mapping[str, Any]]:
    """Give the students that the answer speaks of, then others that were sliced."""
    spoken = [report.settings.get("reference", "finetune")]
    for one in told:
        if (one.section.task, one.section.defect) == (group[0].get("task") or "", group[0]["teacher"]):
            spoken += [choice.row["student"] for choice in (one.best, one.rivals.get(_RANDOM)) if choice is not None]
    place = {student: number for number, student in reversed(list(enumerate(spoken)))}
    ordered = sorted(group, key=lambda one: (place.get(one["student"], len(spoken)), one["anatomy"]["slice"] is None))
    return ordered[:_DRAWN]


def _inside(one: Mapping[str, Any], title: str) -> _Drawing:
    student, found, seed = one["student"], one["anatomy"], _seeds({one["seed"]})
    weights = sum(layer["num_weights"] for layer in found["layers"])
    layers = _counted(len(found["layers"]), "layer")
    moved = {group: change["quantiles"] for group, change in found["change"].items() if change["num_weights"]}
    reach = ", ".join(f"{group} weights from {of['0.01']:.2g} to {of['0.99']:.2g}" for group, of in moved.items())
    words = {
        "weight_changes": (
            f"{student}: change of the weights, student − teacher; n = {weights:,} weights in {layers}, {seed}.",
            f"Histogram of weight changes. 98 % of the {reach}.",
        )
    }
    if found["slice"] is not None:
        kept = [layer["num_kept"] / layer["num_weights"] for layer in found["layers"]]
        reset = weights - sum(layer["num_kept"] for layer in found["layers"])
        words["share_kept"] = (
            f"{student}: share of weights kept by layer; n = {weights:,} weights in {layers}, {seed}.",
            f"Bars, one a layer: from {100 * min(kept):.1f} % to {100 * max(kept):.1f} % kept.",
        )
        words["reset_magnitudes"] = (
            f"{student}: magnitude of the teacher's weights that were reset and kept, median and quartiles by layer; "
            f"n = {reset:,} reset of {weights:,} weights, {seed}.",
            f"Two ranges a layer, kept and reset weights, over {layers}.",
        )
    if found["coverage"] is not None:
        covered = found["coverage"]
        neurons, never = (
            sum(layer[end][key] for layer in covered["layers"] for end in ("input", "output"))
            for key in ("num_neurons", "num_never")
        )
        words["coverage_frequencies"] = (
            f"{student}: how often neurons are covered; n = {neurons:,} ends of neurons in "
            f"{_counted(len(covered['layers']), 'layer')}, on {covered['num_samples']:,} samples, {seed}.",
            f"Histogram of coverage frequencies. {never:,} of {neurons:,} were never covered.",
        )
    stem = f"{one.get('task') or ''}_{one['teacher']}_{student}"
    return _Drawing(("made", title), stem, lambda path: anatomy_pictures(found, path), words)


def _training(logged: Mapping[str, Mapping[str, Any]], group: Sequence[Mapping[str, Any]], title: str) -> _Drawing:
    metric = next(
        (
            name.removeprefix("eval_")
            for name in ("eval_accuracy", *(name for curves in logged.values() for name in curves))
            if name.startswith("eval_") and any(_is_share(curves.get(name)) for curves in logged.values())
        ),
        "accuracy",
    )
    points = [curves["loss"]["num_logged"] for curves in logged.values()]
    seeds = _seeds({one["seed"] for one in group})
    more = sum("loss" in one["anatomy"]["history"] for one in group) - len(logged)
    caption = (
        f"Training of {title}: n = {_counted(len(logged), 'student')}, {_span(points)} logged losses each, {seeds}."
    )
    caption += f" {_counted(more, 'student')} not drawn." if more else ""
    ends = ", ".join(f"{student} {curves['loss']['values'][-1]:.3g}" for student, curves in logged.items())
    words = {"it": (caption, f"Curves of the training loss. At the end: {ends}.")}
    stem = f"convergence_{group[0].get('task') or ''}_{group[0]['teacher']}"
    return _Drawing(
        ("made", title), stem, lambda path: {"it": convergence(logged, f"{path}.png", metric=metric)}, words
    )


def _is_share(curve: Mapping[str, Any] | None) -> bool:
    return curve is not None and all(0 <= value <= 1 for value in curve["values"])


def _made_note(report: DefectReport, drawn: Sequence[_Drawing]) -> str:
    shown = sum("weight_changes" in one.words for one in drawn)
    return (
        f"Measured on {_counted(len(report.anatomies), 'student')}, of the first seed each; {shown} of them are drawn, "
        "those that the answer speaks of first. The numbers of all are in the report's JSON."
    )


def read_maps(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read what `write_html` takes as `maps` from a JSON file.

    Args:
        path: A file with the key "maps", entries as `write_html` takes them. Each "png" is the name of a picture that
            lies beside the file.

    Returns:
        The entries, with the pictures' paths.

    Raises:
        CorruptFileError: The file holds no such entries, or names a picture elsewhere.
    """
    path = Path(path)
    try:
        entries = [dict(one) for one in json.loads(path.read_text())["maps"]]
        for one in entries:
            if Path(one["png"]).name != one["png"]:
                raise ValueError(f"{one['png']!r} is not the name of a picture beside it")
            one["png"] = path.with_name(one["png"])
            if not isinstance(one["title"], str) or not isinstance(one.get("share", {}), dict):
                raise ValueError(f"a map's title or share is of another type, with {one['png'].name}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} holds no maps for a report ({error!r}). A list 'maps' of entries with 'title' and 'png' is wanted."
        ) from error
    return entries


def _map_of(given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given.get("title"), str) or "png" not in given:
        raise ValueError(f"A map has a 'title' and a 'png', bytes or a path, but got the keys {sorted(given)}.")
    png = given["png"]
    content = bytes(png) if isinstance(png, bytes | bytearray) else Path(png).read_bytes()
    if content[:8] != _PNG:
        raise ValueError(f"The picture of map {given['title']!r} is no PNG file. pictures.overlay() writes one.")
    share = given.get("share") or {}
    counted = share.get("num_samples", share.get("n"))
    caption = " ".join(str(given.get("caption") or "").split())
    if "n = " not in caption:
        told = "not given" if counted is None else f"{counted} samples"
        caption = f"{caption}{' ' if caption else ''}(n = {told})"
    return {
        "title": given["title"],
        "png": content,
        "caption": caption,
        "alt": f"Images with maps over them: {given['title']}",
        "table": _share_table(share),
    }


def _share_table(share: Mapping[str, Any]) -> Table | None:
    """Give the share of the maps' mass inside the trigger, beside the trigger's share of the area."""
    if not share:
        return None
    lines = []
    # One share, or several by name: of the teacher, of each student.
    named = share if all(isinstance(one, Mapping) for one in share.values()) else {"all": share}
    for name, one in named.items():
        cells = ["-" if one.get(key) is None else f"{100 * one[key]:.1f}" for key in ("value", "low", "high", "chance")]
        interval = f"{cells[0]} [{cells[1]}, {cells[2]}]" if one.get("low") is not None else cells[0]
        counts = [str(one.get(key, "-")) for key in ("num_samples", "num_without_mass")]
        lines.append([name, interval, cells[3], *counts])
    header = ("of", "mass inside the trigger % [95 %]", "by chance (area) %", "n", "without mass")
    return Table("Share of the maps' mass inside the trigger", header, lines)


# --- words ---


def _rate(rate: Any) -> str:  # noqa: ANN401 - a rate
    # No line ends between a number and what belongs to it.
    told = f"{percent(rate)} % [{_tenths(rate.low)}, {_tenths(rate.high)}] (n = {rate.num_samples:,})"
    return told.replace(" ", "\N{NO-BREAK SPACE}").replace("]\N{NO-BREAK SPACE}(", "] (")


def _tenths(share: float) -> str:
    return f"{100 * share:.1f}"


def _name(choice: Choice) -> str:
    ratio = choice.row["made"].get("slice_ratio")
    return f"{choice.rule}, slice ratio {ratio:g}" if ratio is not None else choice.rule


def _point(row: Mapping[str, Any]) -> str:
    return f"accuracy {percent(row['acc'])} %, DIR {percent(row['dir'])} %"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _seeds(seeds: set[Any]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(sorted(map(str, seeds)))}"


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes, default=0), max(sizes, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
