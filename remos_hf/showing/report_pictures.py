"""Pictures of a report: accuracy against DIR, and re-activation."""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.report import DefectReport
from remos_hf.judging.rows import over_counts, over_seeds
from remos_hf.judging.words import span_told
from remos_hf.showing.canvas import GREY, PERCENT, looks_of_kinds, new_figure, styled, written

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install 'remos_hf[plots]'.") from error


def reactivation_curve(records: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Draw the DIR after re-tuning with so many poisoned samples; one line a student, its benign twin's dashed.

    Args:
        records: Of a `DefectReport`, all of one task and defect. Seeds of a student are pooled; records without
            re-activation are left out.
        path: The PNG file.

    Returns:
        The file written.

    Raises:
        ValueError: No record holds re-activation, or they are of several defects.
    """
    return written(path, _reactivation_figure([records] if isinstance(records, Mapping) else list(records)))


def accuracy_against_dir(
    report: DefectReport, path: str | os.PathLike, defect: str | None = None, *, task: str | None = None
) -> Path:
    """Draw accuracy against DIR: a panel for each task and defect, with 95 % intervals, Pareto front and benign floor.

    Students on the front are those that no other beats in accuracy without a higher DIR. Seeds are pooled. Points of
    one rule are joined in the order of their slice ratio.

    Args:
        report: The report.
        path: The PNG file.
        defect: Draw this one alone, with the slice ratios beside the points.
        task: Draw this one alone, in the colours that the whole report's picture has.

    Returns:
        The file written. Students without a DIR (none of whose samples could show the defect) are named, not drawn.

    Raises:
        ValueError: The report has no record, or none of this defect and task.
    """
    return written(path, _accuracy_figure(report, defect, task))


@styled
def _reactivation_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    held = [record for record in records if record.get("reactivation")]
    about = {(record.get("task") or "", record["defect"]) for record in held}
    if len(about) != 1:
        raise ValueError(
            "Re-activation is drawn of one task and defect, but "
            + (f"got {sorted(about)}. Choose the records of one." if about else "no record holds any.")
        )
    students = list(dict.fromkeys(record["student"] for record in held))
    own, twin = (
        {name: over_counts(one.get(key) for one in held if one["student"] == name) for name in students}
        for key in ("reactivation", "floor_reactivation")
    )
    task, defect = about.pop()
    told = f"{task}: {defect}" if task else defect
    sizes = [rate.num_samples for curve in own.values() for rate in curve.values()]
    figure = new_figure(f"Re-activation of {told}", 4.3 + 0.12 * len(students))
    axes = figure.subplots()
    axes.set_title(f"n = {span_told(sizes)} samples a point")
    places: set[int] = set()
    for name, (colour, marker) in zip(students, looks_of_kinds(), strict=False):
        for curve, line, label in ((own[name], "-", name), (twin[name], "--", None)):
            drawn = {count: rate for count, rate in curve.items() if rate.value is not None}
            if not drawn:
                continue
            places |= set(drawn)
            rates = list(drawn.values())
            axes.errorbar(
                list(drawn),
                [rate.value for rate in rates],
                yerr=_reach(rates),
                color=colour,
                marker=marker,
                linestyle=line,
                markerfacecolor=colour if line == "-" else "white",
                capsize=3,
                elinewidth=1,
                label=label,
            )
    if any(twin.values()):
        axes.plot([], [], color=GREY, linestyle="--", label="dashed: benign twin (floor)")
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xticks(sorted(places), [f"{count:,}" for count in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("poisoned samples in re-tuning (log scale)")
    axes.set_ylabel("DIR (%), 95 % interval")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@styled
def _accuracy_figure(report: DefectReport, defect: str | None, task: str | None = None) -> Figure:
    panels = _by_defect(report, defect, task)
    looks = dict(zip(dict.fromkeys(_kind(record) for record in report.records), looks_of_kinds(), strict=False))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    kinds = {_kind(record) for students in panels.values() for records in students.values() for record in records}
    height = rows * (4.2 if columns == 1 else 3.2) + 0.6 + 0.22 * math.ceil((len(kinds) + 2) / 2)
    figure = new_figure("Accuracy against DIR (upper left is better)", height)
    # The same scales everywhere, so that panels compare.
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    several_tasks = len({of for of, _ in panels}) > 1
    drawn: set[str] = set()
    for number, (axes, ((of, name), students)) in enumerate(zip(grid, panels.items(), strict=False)):
        lines = [f"{of}: {name}" if several_tasks else name]
        points = _points(students)
        drawn |= {_kind(students[student][0]) for student in points}
        _draw_points(axes, points, students, looks, with_ratios=len(panels) == 1)
        floor = over_seeds(students.get(report.settings.get("reference", "finetune"), []), "floor")
        if floor is not None and floor.value is not None:
            axes.axvline(floor.value, color="black", linestyle=":", linewidth=1.4)
        accs, dirs = ([rates[place].num_samples for rates in points.values()] for place in (0, 1))
        lines.append(f"n: ACC {span_told(accs)}, DIR {span_told(dirs)}")
        missing = [student for student in students if student not in points]
        if missing:
            width = 60 // columns
            lines.append(textwrap.shorten(f"no DIR: {', '.join(missing)}", width, placeholder=" ..."))
        axes.set_title("\n".join(lines))
        if number % columns == 0:
            axes.set_ylabel("ACC (%)")
        if number + columns >= len(panels):  # nothing below
            axes.set_xlabel("DIR (%)")
            axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for kind, (colour, marker) in looks.items():
        if kind in drawn:
            grid[0].plot([], [], color=colour, marker=marker, linestyle="none", label=kind)
    grid[0].plot([], [], color=GREY, linewidth=5, alpha=0.35, label="Pareto front")
    grid[0].plot([], [], color="black", linestyle=":", label="benign floor")
    figure.legend(loc="outside lower left", ncols=2, columnspacing=1.0, handletextpad=0.5)
    return figure


def _draw_points(
    axes: Axes,
    points: Mapping[str, tuple[Rate, Rate]],
    students: Mapping[str, list[Mapping[str, Any]]],
    looks: Mapping[str, tuple[str, str]],
    *,
    with_ratios: bool,
) -> None:
    front = _front([(dir_.value, acc.value) for acc, dir_ in points.values()])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=5, alpha=0.35, zorder=1)
    by_kind: dict[str, list[str]] = {}
    for name in sorted(points, key=lambda name: -_ratio(students[name][0])):
        by_kind.setdefault(_kind(students[name][0]), []).append(name)
    beside = cycle((("left", 4), ("left", -12), ("right", 4), ("right", -12)))
    for kind, names in by_kind.items():
        colour, marker = looks[kind]
        accs, dirs = zip(*(points[name] for name in names), strict=True)
        x, y = [rate.value for rate in dirs], [rate.value for rate in accs]
        reach = {"xerr": _reach(dirs), "yerr": _reach(accs)}
        axes.errorbar(x, y, **reach, color=colour, marker=marker, linewidth=0.8, elinewidth=0.9, markersize=5)
        if with_ratios and "slice_ratio" in (students[names[0]][0].get("made") or {}):
            side, above = next(beside)
            for name, *place in zip(names, x, y, strict=True):
                told = axes.annotate(
                    f"{_ratio(students[name][0]):g}",
                    place,
                    (4 if side == "left" else -4, above),
                    textcoords="offset points",
                    ha=side,
                    color=colour,
                )
                told.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)


def _reach(rates: Sequence[Rate]) -> list[list[float]]:
    """Give how far intervals reach below and above their values."""
    ends = [
        (rate.value if rate.low is None else rate.low, rate.value if rate.high is None else rate.high) for rate in rates
    ]
    sides = zip(
        *((rate.value - low, high - rate.value) for rate, (low, high) in zip(rates, ends, strict=True)), strict=True
    )
    return [[max(0.0, one) for one in side] for side in sides]  # rounding may leave -1e-17


def _by_defect(
    report: DefectReport, defect: str | None, task: str | None
) -> dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]]:
    """Give the records of each student by task and defect."""
    panels: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in report.records:
        if defect in (None, record["defect"]) and task in (None, record.get("task") or ""):
            panel = panels.setdefault((record.get("task") or "", record["defect"]), {})
            panel.setdefault(record["student"], []).append(record)
    if not panels:
        known = sorted({record["defect"] for record in report.records})
        of = "" if task is None else f" for task {task!r}"
        raise ValueError(f"defect is one that the report measured, {known}, but got {defect!r}{of}.")
    return panels


def _points(students: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, tuple[Rate, Rate]]:
    """Give accuracy and DIR of the students that have both, seeds pooled."""
    pooled = {name: tuple(over_seeds(records, key) for key in ("acc", "dir")) for name, records in students.items()}
    return {name: (acc, dir_) for name, (acc, dir_) in pooled.items() if acc and dir_ and dir_.value is not None}


def _kind(record: Mapping[str, Any]) -> str:
    """Name what students of different slice ratios have in common."""
    return (record.get("made") or {}).get("rule") or record["student"]


def _ratio(record: Mapping[str, Any]) -> float:
    return (record.get("made") or {}).get("slice_ratio", 1.0)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the points, by ascending DIR, that have more accuracy than all of a lower or equal DIR."""
    front: list[tuple[float, float]] = []
    for dir_, acc in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or acc > front[-1][1]:
            front.append((dir_, acc))
    return front
