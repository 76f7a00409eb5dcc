"""The one table that everything is said of: a row a student, its seeds together, with what it was compared with."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remos_hf.evaluation.measures import Ratio, rate_of
from remos_hf.evaluation.over_seeds import (
    LEAST_SPREAD,
    SeedDifference,
    SeedRate,
    difference_over_seeds,
    rate_over_seeds,
)
from remos_hf.judging.kinds import MIXED, TEACHER, kind_of_all
from remos_hf.judging.words import name_told

CLEAN = "clean"  # the never-poisoned teacher's name among a report's teachers
GIVEN = "given"  # a teacher that was given, and not made by an audit
_ROUNDING = 1e-9  # 0.58 - 0.57 is not quite 0.01

Row = dict[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What one rule reaches within an accuracy budget: the student that resets most, chosen on dev accuracy alone.

    Attributes:
        rule: The rule, or the student where it slices nothing.
        budget: Accuracy that may be lost on the dev split, as a share.
        row: The student's row; None if none is within the budget.
    """

    rule: str
    budget: float
    row: Row | None


@dataclass(frozen=True)
class Section:
    """The numbers of one task and defect.

    Attributes:
        task: Name of the setting; "" if it has none.
        defect: Name of the defect.
        rows: The students, as `DefectReport.tables` gives them.
        plain: The row of plain fine-tuning; None if it was not measured.
        teacher: The row of the teacher that students were started from; None if it was not measured.
        clean_teacher: The row of the never-poisoned one; None likewise, and where the defect was found on it.
        chosen: What each rule reaches within each budget; empty without dev accuracy.
        described: The defect's own description among the report's settings; empty where there is none.
        exposed: How its exposed inputs were made: counts of samples, and of those left out by reason; empty likewise.
        reference: The name that plain fine-tuning has in the report, whether it was measured or not.
    """

    task: str
    defect: str
    rows: list[Row]
    plain: Row | None
    teacher: Row | None
    clean_teacher: Row | None
    chosen: list[Choice]
    described: Mapping[str, Any]
    exposed: Mapping[str, Any]
    reference: str = "finetune"

    @property
    def title(self) -> str:
        """Task and defect, fit to be shown."""
        defect = name_told(self.defect)
        return f"{name_told(self.task)}: {defect}" if self.task else defect

    @property
    def implanted(self) -> bool:
        """Whether the defect forces a label, as those do that somebody put there."""
        return any(record.get("flip") is not None for row in self.rows for record in row["records"])

    @property
    def given(self) -> bool:
        """Whether these very students were given to be measured, and not made by an audit."""
        return any(map(is_given, self.rows))


def section_of(
    task: str, defect: str, rows: list[Row], settings: Mapping[str, Any], budgets: Sequence[float]
) -> Section:
    """Put together what a report holds of one task and defect."""
    reference = settings.get("reference", "finetune")
    audit = (settings.get("audits") or {}).get(task) or {}
    teachers = (settings.get("teachers") or {}).get(task) or {}
    given = all(map(is_given, rows))
    own = teacher_row(teachers, (GIVEN, defect) if given else (defect, GIVEN), defect)
    found = teacher_row(teachers, (CLEAN,), defect)
    return Section(
        task,
        defect,
        rows,
        named_row(rows, reference),
        own or (found if found and found["dir"].value is not None else None),
        found if own else None,
        best_within(rows, reference, budgets),
        (audit.get("defects") or {}).get(defect) or {},
        (audit.get("exposed") or {}).get(defect) or {},
        reference,
    )


def rows_of(records: Sequence[Record], reference: str) -> list[Row]:
    """Make the rows of one task and defect, in the order of the records.

    Args:
        records: All of one task and defect.
        reference: Name of plain fine-tuning.
    """
    by_student: dict[str, list[Record]] = {}
    for record in records:
        by_student.setdefault(record["student"], []).append(record)
    plain = by_student.get(reference, [])
    return [_row(name, of, plain, reference) for name, of in by_student.items()]


def _row(name: str, records: list[Record], plain: list[Record], reference: str) -> Row:
    twins = [record for record in records if record.get("excess")]
    acc, dir_ = over_seeds(records, "acc"), over_seeds(records, "dir")
    plain_acc, plain_dir = ([_on_seeds_of(plain, records, key) for key in ("acc", "dir")]) if plain else (None, None)
    own_acc, own_dir = ([_on_seeds_of(records, plain, key) for key in ("acc", "dir")]) if plain else (None, None)
    lost = compared(plain, records, "dev_acc")
    ways = [record.get("made") or {} for record in records]
    kind = kind_of_all(ways, reference=name == reference)
    made = {} if kind == MIXED else ways[0]
    return {
        "student": name,
        "kind": kind,
        "records": records,
        "seeds": len(records),
        "acc": acc,
        "dev_loss": lost.value,
        "dir": dir_,
        "dir_fooled": over_seeds(records, "dir_fooled") if any(one.get("dir_fooled") for one in records) else None,
        "dir_by_seed": list(dir_.by_seed),
        "acc_by_seed": list(acc.by_seed),
        "floor": over_seeds(records, "floor") if any(one.get("floor") for one in records) else None,
        "floor_acc": over_seeds(records, "floor_acc") if any(one.get("floor_acc") for one in records) else None,
        "excess": _excess(twins) if twins else None,
        "relative_acc": _ratio(own_acc, plain_acc),
        "relative_dir": _ratio(own_dir, plain_dir),
        "against_plain": {key: compared(records, plain, key) for key in ("dir", "acc")},
        "reactivation": over_counts(record.get("reactivation") for record in records),
        "floor_reactivation": over_counts(record.get("floor_reactivation") for record in records),
        "commonest": _mean([record.get("commonest") for record in records]),
        "made": made,
        "squares_reset": _mean([(record.get("made") or {}).get("squares_reset") for record in records]),
    }


def teacher_row(teachers: Mapping[str, Any], kinds: Sequence[str], defect: str) -> Row | None:
    """Make the row of a teacher from what was measured of it, seed by seed; None if nothing was.

    Args:
        teachers: What `measure` gave, by "<kind>-<seed>".
        kinds: The first of them that was measured is taken.
        defect: The defect.
    """
    for kind in kinds:
        held = {
            name: one
            for name, one in teachers.items()
            if name == kind or (name.startswith(f"{kind}-") and name.removeprefix(f"{kind}-").isdigit())
        }
        if held:
            nothing = {"value": None, "count": 0, "num_samples": 0, "low": None, "high": None}
            records = [
                {
                    "student": name,
                    "seed": name.removeprefix(kind).removeprefix("-"),
                    "acc": one["acc"],
                    "dir": (one.get("dir") or {}).get(defect) or nothing,
                    "flip": (one.get("flip") or {}).get(defect),
                    "flip_clean": (one.get("flip_clean") or {}).get(defect),
                    "commonest": one.get("commonest"),
                }
                for name, one in sorted(held.items())
            ]
            row = _row("teacher", records, [], "")
            return {**row, "kind": TEACHER}
    return None


def compared(own: Sequence[Record], other: Sequence[Record], key: str) -> SeedDifference:
    """Subtract another student's rate from one's own, on the seeds that both have, sample by sample where it is known.

    Args:
        own: Records of a student, one a seed.
        other: Records of the other.
        key: "dir", "acc" or "dev_acc".
    """
    its = {record["seed"]: record for record in other}
    both = [(record, its[record["seed"]]) for record in own if record["seed"] in its]
    both = [pair for pair in both if all(record.get(key) for record in pair)]
    pairs = [tuple(rate_of(record[key]) for record in pair) for pair in both]
    known = [] if key == "dev_acc" else [tuple(record.get("outcomes") for record in pair) for pair in both]
    return difference_over_seeds(pairs, known, "acc" if key == "acc" else "dir")


def over_seeds(records: Iterable[Record], key: str) -> SeedRate:
    """Put a rate of several records, one a seed, together."""
    least = 0.0 if key in ("acc", "floor_acc") else LEAST_SPREAD
    return rate_over_seeds([rate_of(record[key]) for record in records if record.get(key)], least_spread=least)


def over_counts(curves: Iterable[Mapping[str, Any] | None]) -> dict[int, SeedRate]:
    """Put curves of re-activation together, by number of poisoned samples."""
    held = [curve for curve in curves if curve]
    counts = sorted({int(count) for curve in held for count in curve})
    return {count: over_seeds(held, str(count)) for count in counts}


def named_row(rows: list[Row], student: str) -> Row | None:
    """Find a student's row; None if it has none."""
    return next((row for row in rows if row["student"] == student), None)


def is_given(row: Row) -> bool:
    """Whether these very students were given, and not made by an audit."""
    return any(record.get(GIVEN) for record in row["records"])


def rule_of(row: Mapping[str, Any]) -> str:
    """Name what students of different slice ratios have in common."""
    return row["made"].get("rule", row["student"])


def best_within(rows: list[Row], reference: str, budgets: Sequence[float]) -> list[Choice]:
    """For each rule, the largest reset whose dev accuracy stays within a budget of plain fine-tuning's."""
    if named_row(rows, reference) is None:
        return []
    curves: dict[str, list[Row]] = {}
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


def _excess(records: Sequence[Record]) -> SeedDifference:
    pairs = [(rate_of(record["dir"]), rate_of(record["floor"])) for record in records]
    known = [(record.get("outcomes"), record.get("floor_outcomes")) for record in records]
    return difference_over_seeds(pairs, known, least_spread=LEAST_SPREAD)


def _on_seeds_of(records: Sequence[Record], other: Sequence[Record], key: str) -> SeedRate:
    seeds = {record["seed"] for record in other}
    return over_seeds([record for record in records if record["seed"] in seeds], key)


def _ratio(own: SeedRate | None, plain: SeedRate | None) -> Ratio | None:
    if own is None or plain is None or own.value is None or not plain.value:
        return None
    return Ratio(own.value / plain.value, None, None)


def _mean(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None
