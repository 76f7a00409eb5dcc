"""The tables of a report: records pooled over seeds, and cells as text."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remos_hf.evaluation.measures import Rate, excess_dir, relative_accuracy, relative_dir
from remos_hf.evaluation.reactivation import samples_needed

# Below this excess over the benign floor, plain fine-tuning has nothing that a strategy could reduce.
INHERITS = 0.1


# A defect is back when it shows on this share of the samples.
BACK = 0.5


_ROUNDING = 1e-9  # 0.58 - 0.57 is not quite 0.01


def rule_of(row: Mapping[str, Any]) -> str:
    """Name what students of different slice ratios have in common."""
    return row["made"].get("rule", row["student"])


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


@dataclass(frozen=True)
class Choice:
    """What one rule reaches within an accuracy budget: the student that resets most, chosen on dev accuracy alone.

    Attributes:
        rule: The rule, or the student where it slices nothing.
        budget: Accuracy that may be lost on the dev split, as a share.
        row: The student's row of `DefectReport.tables`; None if none is within the budget.
    """

    rule: str
    budget: float
    row: dict[str, Any] | None


@dataclass(frozen=True)
class Section:
    """All that a report says of one task and defect.

    Attributes:
        task: Name of the setting; "" if it has none.
        defect: Name of the defect.
        rows: The students, as `DefectReport.tables` gives them.
        plain: The row of plain fine-tuning; None if it was not measured.
        inherits: Whether plain fine-tuning inherits the defect: at least 10 points over the benign floor, with an
            interval above 0. Without a floor, a DIR of at least 10 %.
        remarks: What a reader must know before believing the table.
        chosen: What each rule reaches within each budget; empty without dev accuracy.
        students: The table of students.
        equal_accuracy: The table of `chosen`, or None.
        reactivation: The table of re-activation, or None.
    """

    task: str
    defect: str
    rows: list[dict[str, Any]]
    plain: dict[str, Any] | None
    inherits: bool
    remarks: list[str]
    chosen: list[Choice]
    students: Table
    equal_accuracy: Table | None
    reactivation: Table | None

    @property
    def title(self) -> str:
        """Task and defect."""
        return f"{self.task}: {self.defect}" if self.task else self.defect


def pooled_rates(rates: Iterable[Mapping[str, Any] | None]) -> Rate | None:
    """Count all samples of several rates together; None if there is no rate."""
    held = [rate for rate in rates if rate]
    if not held:
        return None
    return Rate.of(sum(rate["count"] for rate in held), sum(rate["num_samples"] for rate in held))


def pooled_row(name: str, records: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a student's row of `DefectReport.tables` from its records and plain fine-tuning's."""

    def pooled(of: list[dict[str, Any]], key: str) -> Rate | None:
        return pooled_rates(record.get(key) for record in of)

    # What is subtracted or divided comes from the same seeds: of a run that is not over, some students lack some.
    twins = [record for record in records if record.get("excess")]
    seeds = {record["seed"] for record in records} & {record["seed"] for record in plain}
    mine, plain = ([record for record in of if record["seed"] in seeds] for of in (records, plain))
    dev, plain_dev = pooled(mine, "dev_acc"), pooled(plain, "dev_acc")
    return {
        "student": name,
        "seeds": len(records),
        "acc": pooled(records, "acc"),
        "dev_loss": plain_dev.value - dev.value if dev and plain_dev else None,
        "dir": pooled(records, "dir"),
        "dir_fooled": pooled(records, "dir_fooled"),
        "dir_by_seed": [record["dir"]["value"] for record in records],
        "acc_by_seed": [record["acc"]["value"] for record in records],
        "floor": pooled(records, "floor"),
        "floor_acc": pooled(records, "floor_acc"),
        "excess": excess_dir(pooled(twins, "dir"), pooled(twins, "floor")) if twins else None,
        "relative_acc": relative_accuracy(pooled(mine, "acc"), pooled(plain, "acc")) if seeds else None,
        "relative_dir": relative_dir(pooled(mine, "dir"), pooled(plain, "dir")) if seeds else None,
        "reactivation": pooled_counts(record.get("reactivation") for record in records),
        "floor_reactivation": pooled_counts(record.get("floor_reactivation") for record in records),
        "made": records[0].get("made") or {},
        "squares_reset": _mean([(record.get("made") or {}).get("squares_reset") for record in records]),
    }


def pooled_counts(curves: Iterable[Mapping[str, Any] | None]) -> dict[int, Rate]:
    """Pool curves of re-activation, by number of poisoned samples."""
    held = [curve for curve in curves if curve]
    counts = sorted({int(count) for curve in held for count in curve})
    return {count: pooled_rates(curve.get(str(count)) for curve in held) for count in counts}


def named_row(rows: list[dict[str, Any]], student: str) -> dict[str, Any] | None:
    """Find a student's row; None if it has none."""
    return next((row for row in rows if row["student"] == student), None)


def _mean(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None


def is_inherited(row: Mapping[str, Any]) -> bool:
    """Whether plain fine-tuning's row shows the defect so that it could be reduced (see `Section.inherits`)."""
    if _lacks_floor(row):
        return (row["dir"].value or 0.0) >= INHERITS
    return row["excess"].value >= INHERITS and row["excess"].low > 0


def _lacks_floor(row: Mapping[str, Any]) -> bool:
    return row["excess"] is None or row["excess"].value is None


def remarks_on(plain: Mapping[str, Any] | None, reference: str) -> list[str]:
    """Say what a reader must know of a table before believing it."""
    if plain is None:
        return [f"Plain fine-tuning ({reference}) was not measured: whether there is anything to reduce is not known."]
    remarks = []
    if plain["dir"].value is None:
        remarks.append("Plain fine-tuning gets no sample right on which the defect could show: it has no DIR.")
    elif _lacks_floor(plain):
        remarks.append("Plain fine-tuning has no benign floor: part of its DIR may be errors of its own.")
    if not is_inherited(plain):
        remarks.append(
            "Plain fine-tuning does not inherit this defect: there is nothing to reduce, and no row shows that a "
            "strategy works."
        )
    return remarks


def percent(rate: Any, *, interval: bool = False) -> str:  # noqa: ANN401 - a rate, a difference or a ratio
    """Write a share as a percentage with one digit, if asked with its interval; "-" where it has no value."""
    if rate is None or rate.value is None:
        return "-"
    text = tenths(rate.value)
    return f"{text} [{tenths(rate.low)}, {tenths(rate.high)}]" if interval and rate.low is not None else text


def tenths(share: float) -> str:
    """Write a share as a percentage with one digit, without its sign."""
    return f"{round(100 * share, 1) + 0.0:.1f}"  # 0.0, not -0.0


def by_seed(values: Iterable[float | None]) -> str:
    """Write shares of several seeds one after another."""
    return ", ".join("-" if value is None else tenths(value) for value in values)


def markdown_of(table: Table) -> list[str]:
    """Write a table as lines of markdown."""
    rule = ["---", *("---:" for _ in table.header[1:])]
    return [f"| {' | '.join(line)} |" for line in (table.header, rule, *table.lines)]


def students_table(rows: list[dict[str, Any]]) -> Table:
    """Put the students' rows into cells."""
    header = (
        "student",
        "ACC % (by seed)",
        "DIR % [95 %] (by seed)",
        "n",
        "benign floor %",
        "excess DIR [95 %]",
        "rACC",
        "rDIR",
        "squares reset %",
    )
    fooled = any(row["dir_fooled"] for row in rows)
    header = (*header, "DIR % on what fools the teacher [95 %] (n)") if fooled else header
    lines = []
    for row in rows:
        relative = [row["relative_acc"], row["relative_dir"]]
        lines.append(
            [
                row["student"],
                f"{percent(row['acc'])} ({by_seed(row['acc_by_seed'])})",
                f"{percent(row['dir'], interval=True)} ({by_seed(row['dir_by_seed'])})",
                str(row["dir"].num_samples),
                percent(row["floor"]),
                percent(row["excess"], interval=True),
                *("-" if one is None or one.value is None else f"{one.value:.2f}" for one in relative),
                _share_reset(row),
                *([_with_count(row["dir_fooled"])] if fooled else []),
            ]
        )
    return Table("Students", header, lines)


def _with_count(rate: Rate | None) -> str:
    return "-" if rate is None else f"{percent(rate, interval=True)} ({rate.num_samples})"


def _share_reset(row: Mapping[str, Any]) -> str:
    return "-" if row["squares_reset"] is None else f"{100 * row['squares_reset']:.1f}"


def best_within(rows: list[dict[str, Any]], reference: str, budgets: Sequence[float]) -> list[Choice]:
    """For each rule, the largest reset whose dev accuracy stays within a budget of plain fine-tuning's."""
    if named_row(rows, reference) is None:
        return []
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["student"] != reference and row["dev_loss"] is not None:
            # What slices nothing is a rule of its own: learning faster is a rival too.
            curves.setdefault(rule_of(row), []).append(row)
    chosen = []
    for rule, points in curves.items():
        for budget in budgets:
            able = [point for point in points if point["dev_loss"] <= budget + _ROUNDING]
            best = min(able, key=lambda point: point["made"].get("slice_ratio", 1.0), default=None)
            chosen.append(Choice(rule, budget, best))
    return chosen


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


def reactivation_table(rows: list[dict[str, Any]]) -> Table | None:
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


def _needed(rates: Mapping[int, Rate | None]) -> str:
    held = {count: rate for count, rate in rates.items() if rate is not None}
    if not held:
        return ""
    needed = samples_needed(held, BACK)
    return f"more than {max(held)}" if needed is None else str(needed)
