"""Pictures of a report: accuracy against DIR, and re-activation. They show the rows of its tables and pool nothing."""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from remos_hf.judging.report import DefectReport
from remos_hf.judging.words import span_told
from remos_hf.showing.canvas import GREY, PERCENT, new_figure, styled, written
from remos_hf.showing.palette import Look, kind_shown, looks_of

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install 'remos_hf[plots]'.") from error

Row = Mapping[str, Any]
Place = tuple[str, str]  # task and defect
_APART = 0.047  # of a DIR, so that two letters of its axis do not overlap


@dataclass(frozen=True)
class Shown:
    """What pictures show of a report.

    Attributes:
        rows: The students, by task and defect.
        looks: Of the kinds of all students, by the kind's key.
        reference: Name of plain fine-tuning.
    """

    rows: dict[Place, list[Row]]
    looks: dict[str, Look]
    reference: str

    def look(self, row: Row) -> Look:
        """Give the look of a student."""
        return self.looks[self.key(row)]

    def key(self, row: Row) -> str:
        """Give the key of a student's kind."""
        return kind_shown(row)[0]


def shown_of(report: DefectReport) -> Shown:
    """Take from a report what pictures show."""
    reference, rows = report.settings.get("reference", "finetune"), report.tables()
    return Shown(rows, looks_of(dict(kind_shown(row) for of in rows.values() for row in of)), reference)


def reactivation_curve(
    report: DefectReport, path: str | os.PathLike, defect: str | None = None, *, task: str | None = None
) -> Path:
    """Draw the DIR after re-tuning with so many poisoned samples; one line a student, its benign twin's dashed.

    Colours and markers are those of the kinds of students; slice ratios stand at the ends of the lines. Bars are the
    intervals of the rows; where a row has none, none is drawn.

    Args:
        report: The report; students without re-activation are left out.
        path: The PNG file.
        defect: The defect, if the report has several.
        task: The task, likewise.

    Returns:
        The file written.

    Raises:
        ValueError: No student of this defect and task has re-activation, or several defects remain.
    """
    return written(path, reactivation_figure(shown_of(report), defect, task))


def accuracy_against_dir(
    report: DefectReport, path: str | os.PathLike, defect: str | None = None, *, task: str | None = None
) -> Path:
    """Draw accuracy against DIR: a panel for each task and defect, with intervals, Pareto front and benign floor.

    Students on the front are those that no other beats in accuracy without a higher DIR. Points of one rule are joined
    in the order of their slice ratio. Bars are the intervals of the rows; where a row has none, none is drawn.

    Args:
        report: The report.
        path: The PNG file.
        defect: Draw this one alone, with the slice ratios beside the points.
        task: Draw this one alone.

    Returns:
        The file written. Students without a DIR (none of whose samples could show the defect) are named, not drawn.

    Raises:
        ValueError: The report has no record, or none of this defect and task.
    """
    return written(path, accuracy_figure(shown_of(report), defect, task))


@styled
def reactivation_figure(shown: Shown, defect: str | None = None, task: str | None = None) -> Figure:
    """Make the figure of `reactivation_curve`."""
    held = {place: [row for row in rows if row["reactivation"]] for place, rows in _panels(shown, defect, task).items()}
    held = {place: rows for place, rows in held.items() if rows}
    if len(held) != 1:
        raise ValueError(
            "Re-activation is drawn of one task and defect, but "
            + (f"got {sorted(held)}. Choose one by defect= and task=." if held else "no record holds any.")
        )
    ((of, name), rows), *_ = held.items()
    legend = dict.fromkeys(shown.look(row) for row in rows)
    sizes = [rate.samples_of_a_seed for row in rows for rate in row["reactivation"].values()]
    figure = new_figure(f"Re-activation of {of + ': ' if of else ''}{name}", 4.4 + 0.2 * _legend_lines(legend))
    axes = figure.subplots()
    axes.set_title(f"n = {span_told(sizes)} samples a point")
    places = {count for row in rows for count in _draw_curves(axes, row, shown.look(row))}
    _tell_ratios(axes, [row for row in rows if "slice_ratio" in row["made"]], shown)
    for look in legend:
        axes.plot([], [], color=look.colour, marker=look.marker, label=_legend_name(look))
    if any(row["floor_reactivation"] for row in rows):
        axes.plot([], [], color=GREY, linestyle="--", label="dashed: benign twin (floor)")
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xticks(sorted(places), [f"{count:,}" for count in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("poisoned samples in re-tuning (log scale)")
    axes.set_ylabel("DIR (%)")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _draw_curves(axes: Axes, row: Row, look: Look) -> set[int]:
    """Draw a student and its twin; give the numbers of poisoned samples that were drawn."""
    places: set[int] = set()
    for curve, line in ((row["reactivation"], "-"), (row["floor_reactivation"], "--")):
        drawn = _measured(curve)
        if not drawn:
            continue
        places |= set(drawn)
        values = [rate.value for rate in drawn.values()]
        _draw_intervals(axes, list(drawn), list(drawn.values()), look)
        fill = look.colour if line == "-" else "white"
        axes.plot(list(drawn), values, color=look.colour, marker=look.marker, linestyle=line, markerfacecolor=fill)
    return places


def _measured(curve: Mapping[int, Any]) -> dict[int, Any]:
    return {count: rate for count, rate in curve.items() if rate is not None and rate.value is not None}


def _tell_ratios(axes: Axes, rows: Sequence[Row], shown: Shown) -> None:
    """Write the slice ratios beside the lines, where these lie furthest apart; none where it would lie on another."""
    curves = {row["student"]: _measured(row["reactivation"]) for row in rows}
    counts = sorted({count for curve in curves.values() for count in curve})
    if not counts:
        return
    where = max(counts, key=lambda count: np.ptp([curve[count].value for curve in curves.values() if count in curve]))
    told = [(curves[row["student"]][where].value, row) for row in rows if where in curves[row["student"]]]
    last = -1.0
    for value, row in sorted(told, key=lambda one: one[0]):
        if value - last >= _APART:
            last = value
            _annotate(axes, f"{_ratio(row):g}", (where, value), shown.look(row).colour, ("left", -4))


def _draw_intervals(axes: Axes, counts: Sequence[int], rates: Sequence[Any], look: Look) -> None:
    held = [(count, rate) for count, rate in zip(counts, rates, strict=True) if rate.low is not None]
    if held:
        places, rates = zip(*held, strict=True)
        axes.errorbar(
            places,
            [rate.value for rate in rates],
            yerr=_reach(rates),
            color=look.colour,
            linestyle="none",
            capsize=3,
            elinewidth=1,
        )


@styled
def accuracy_figure(shown: Shown, defect: str | None = None, task: str | None = None) -> Figure:
    """Make the figure of `accuracy_against_dir`."""
    panels = _panels(shown, defect, task)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    drawn = {shown.key(row) for rows in panels.values() for row in rows if _has_point(row)}
    legend = {key: look for key, look in shown.looks.items() if key in drawn}
    height = lines * (4.2 if columns == 1 else 3.2) + 0.6 + 0.2 * (_legend_lines(legend.values()) + 2)
    figure = new_figure("Accuracy against DIR (upper left is better)", height)
    # The same scales everywhere, so that panels compare.
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    several_tasks, floors = len({of for of, _ in panels}) > 1, False
    for number, (axes, ((of, name), rows)) in enumerate(zip(grid, panels.items(), strict=False)):
        _draw_points(axes, [row for row in rows if _has_point(row)], shown, with_ratios=len(panels) == 1)
        floor = next((row["floor"] for row in rows if row["student"] == shown.reference), None)
        if floor is not None and floor.value is not None:
            axes.axvline(floor.value, color="black", linestyle=":", linewidth=1.4)
            floors = True
        axes.set_title("\n".join(_told_panel(f"{of}: {name}" if several_tasks else name, rows, columns)))
        if number % columns == 0:
            axes.set_ylabel("ACC (%)")
        if number + columns >= len(panels):  # nothing below
            axes.set_xlabel("DIR (%)")
            axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for look in legend.values():
        grid[0].plot([], [], color=look.colour, marker=look.marker, linestyle="none", label=_legend_name(look))
    grid[0].plot([], [], color=GREY, linewidth=5, alpha=0.35, label="Pareto front")
    if floors:
        grid[0].plot([], [], color="black", linestyle=":", label="benign floor")
    figure.legend(loc="outside lower left", ncols=2, columnspacing=1.0, handletextpad=0.5)
    return figure


def _told_panel(name: str, rows: Sequence[Row], columns: int) -> list[str]:
    points = [row for row in rows if _has_point(row)]
    accs, dirs = ([row[key].samples_of_a_seed for row in points] for key in ("acc", "dir"))
    told = [
        textwrap.shorten(name, 90 // columns, placeholder=" ..."),
        f"n: ACC {span_told(accs)}, DIR {span_told(dirs)}",
    ]
    missing = [row["student"] for row in rows if not _has_point(row)]
    if missing:
        told.append(textwrap.shorten(f"no DIR: {', '.join(missing)}", 60 // columns, placeholder=" ..."))
    return told


def _draw_points(axes: Axes, rows: Sequence[Row], shown: Shown, *, with_ratios: bool) -> None:
    front = _front([(row["dir"].value, row["acc"].value) for row in rows])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=5, alpha=0.35, zorder=1)
    by_rule: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -_ratio(row)):
        by_rule.setdefault((shown.key(row), row["made"].get("rule") or row["student"]), []).append(row)
    beside = cycle((("left", 4), ("left", -12), ("right", 4), ("right", -12)))
    for (key, _), joined in by_rule.items():
        look = shown.looks[key]
        x, y = ([row[of].value for row in joined] for of in ("dir", "acc"))
        axes.plot(x, y, color=look.colour, marker=look.marker, linewidth=0.8, markersize=6)
        for row in joined:
            for of, reach in (("dir", "xerr"), ("acc", "yerr")):
                if row[of].low is not None:
                    place = row["dir"].value, row["acc"].value
                    options = {reach: _reach([row[of]]), "elinewidth": 0.9, "linestyle": "none"}
                    axes.errorbar(*place, color=look.colour, **options)
        if with_ratios and "slice_ratio" in joined[0]["made"]:
            side = next(beside)
            for row, *place in zip(joined, x, y, strict=True):
                _annotate(axes, f"{_ratio(row):g}", place, look.colour, side)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)


def _annotate(axes: Axes, text: str, place: Sequence[float], colour: str, side: tuple[str, int]) -> None:
    across, above = side
    told = axes.annotate(
        text, place, (4 if across == "left" else -4, above), textcoords="offset points", ha=across, color=colour
    )
    told.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _legend_name(look: Look) -> str:
    """Break a kind's name, so that two stand side by side in a legend."""
    return textwrap.fill(look.name, 28)


def _legend_lines(legend: Iterable[Look]) -> int:
    """Give how many lines of text the names of kinds take side by side."""
    lines = [_legend_name(look).count("\n") + 1 for look in legend]
    half = math.ceil(len(lines) / 2)
    return max(sum(lines[:half]), sum(lines[half:]))


def _reach(rates: Sequence[Any]) -> list[list[float]]:
    """Give how far intervals reach below and above their values."""
    below, above = ([rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates])
    return [[max(0.0, one) for one in side] for side in (below, above)]  # rounding may leave -1e-17


def _panels(shown: Shown, defect: str | None, task: str | None) -> dict[Place, list[Row]]:
    """Give the rows of each student by task and defect."""
    panels = {
        (of, name): rows for (of, name), rows in shown.rows.items() if task in (None, of) and defect in (None, name)
    }
    if not panels:
        known = sorted({name for _, name in shown.rows})
        of = "" if task is None else f" for task {task!r}"
        raise ValueError(f"defect is one that the report measured, {known}, but got {defect!r}{of}.")
    return panels


def _has_point(row: Row) -> bool:
    return bool(row["acc"] and row["dir"]) and row["dir"].value is not None and row["acc"].value is not None


def _ratio(row: Row) -> float:
    return row["made"].get("slice_ratio", 1.0)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give the points, by ascending DIR, that have more accuracy than all of a lower or equal DIR."""
    front: list[tuple[float, float]] = []
    for dir_, acc in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or acc > front[-1][1]:
            front.append((dir_, acc))
    return front
