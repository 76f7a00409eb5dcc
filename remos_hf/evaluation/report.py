"""What students inherited, as records, as JSON and as tables rendered from it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from remos_hf.defects.base import FOOLED, Defect, ExposedSet, check_defects
from remos_hf.errors import CorruptFileError
from remos_hf.evaluation.anatomy import check_anatomy
from remos_hf.evaluation.measures import (
    Rate,
    accuracy,
    defect_inheritance_rate,
    excess_dir,
    label_flip_rate,
    relative_accuracy,
    relative_dir,
)
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.reactivation import samples_needed
from remos_hf.evaluation.tasks import Task, without_map_bars
from remos_hf.whole import replace_file

Student = nn.Module | Callable[[], nn.Module]

# Below this excess over the benign floor, plain fine-tuning has nothing that a strategy could reduce.
INHERITS = 0.1
# A defect is back when it shows on this share of the samples.
BACK = 0.5
_FORMAT_VERSION = 1
_ROUNDING = 1e-9  # 0.58 - 0.57 is not quite 0.01
HOW_TO_READ = (
    "n counts pairs of a sample and a seed. Intervals hold 95 % over those pairs; they leave out the spread between "
    'seeds, which the values in parentheses show. "-": not measured, or no sample left to count.'
)
_PACKAGES = ("remos_hf", "torch", "transformers", "datasets", "accelerate")


def evaluate_transfer(
    students: Mapping[str, Student],
    *,
    teacher: nn.Module,
    dataset: Dataset,
    defects: Mapping[str, Defect] | Sequence[Defect],
    task: Task,
    floor_students: Mapping[str, Student] | None = None,
    reference: str = "finetune",
    name: str = "",
    seed: int | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = True,
) -> "DefectReport":
    """Measure what students inherited: one exposed set a defect, and one forward pass a student over clean and exposed.

    Args:
        students: Models by name, or functions that load one; then only one is held at a time.
        teacher: The teacher that they were started from.
        dataset: Clean test samples of the students' task.
        defects: The defects, by name or named by their class.
        task: How samples are read.
        floor_students: Students of a never-poisoned teacher, made alike, by the same names: their rate is the floor.
        reference: The student that relative figures refer to, plain fine-tuning.
        name: Of the setting, such as "SST-2 to IMDB": reports of several can be added.
        seed: That the students were made with: reports of several are pooled when added.
        cache: Where exposed sets that were costly to make are kept.
        workers: Processes that make them.
        progress: Show bars.

    Returns:
        The report: one record for each student and defect.

    Raises:
        ValueError: There is no student or no defect, two defects have one name, or a floor student has no twin.
    """
    named = _named(defects)
    if not named or not students:
        raise ValueError(f"A transfer needs a defect and a student, but got {len(named)} and {len(students)}.")
    unknown = set(floor_students or {}) - set(students)
    if unknown:
        raise ValueError(f"floor_students names {sorted(unknown)}, but the students are {sorted(students)}.")
    exposed, seconds = {}, {}
    for kind, defect in named.items():
        start = time.perf_counter()
        with without_map_bars():
            exposed[kind] = defect.exposed_set(dataset, teacher=teacher, cache=cache, workers=workers, **task.exposing)
        seconds[kind] = round(time.perf_counter() - start, 2)

    def measured(models: Mapping[str, Student]) -> dict[str, dict[str, Any]]:
        found = {}
        for student, model in models.items():
            start = time.perf_counter()
            found[student] = measure(_model(model), dataset, exposed, task, progress=progress)
            found[student]["made"] = {"seconds": {"measure": round(time.perf_counter() - start, 2)}}
        return found

    own, floors = measured(students), measured(floor_students or {})
    records = [
        {"task": name, "defect": kind, "student": one, "seed": seed, **paired(own[one], floors.get(one), kind)}
        for kind in named
        for one in students
    ]
    chosen = {
        **task.to_dict(),
        "batch_size": task.batch_size,
        "num_samples": len(dataset),
        "defects": {kind: defect.to_dict() for kind, defect in named.items()},
        "exposed": {kind: {**one.facts, "seconds": seconds[kind]} for kind, one in exposed.items()},
    }
    return DefectReport(records, {"reference": reference, "audits": {name: chosen}})


def measure(
    model: nn.Module,
    dataset: Dataset,
    exposed: Mapping[str, ExposedSet],
    task: Task,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure one model: its accuracy, and the rate at which it shows each defect.

    Args:
        model: The model.
        dataset: Clean samples.
        exposed: Exposed sets made from them, by the defect's name.
        task: How samples are read.
        progress: Show bars.

    Returns:
        JSON values: "acc", and under "dir" and "flip" a rate for each defect (flip: of all exposed samples, whether
        right when clean or not). Where an exposed set says which of its inputs `fooled` the teacher, "dir" is over all
        of them, as the artifact's vision scripts count, and "dir_fooled" over those alone, as the paper defines it.

    Source:
        ReMoS: "generated misclassified samples" (paper); all of them: artifact, CV_adv/eval_robustness.py:56-66.
    """
    references = np.array(dataset[task.label_column])
    clean = predict_labels(model, dataset, task, progress=progress)
    found: dict[str, Any] = {"acc": accuracy(clean, references).to_dict(), "dir": {}, "flip": {}, "dir_fooled": {}}
    for name, one in exposed.items():
        if not len(one):  # a search that found nothing
            found["dir"][name] = Rate.of(0, 0).to_dict()
            continue
        predicted = predict_labels(model, one.dataset, task, progress=progress)
        index = np.array(one.clean_index)
        rate = defect_inheritance_rate(predicted, references[index], clean[index], one.target_label)
        found["dir"][name] = rate.to_dict()
        if FOOLED in one.dataset.column_names:
            held = np.array(one.dataset[FOOLED], dtype=bool)
            some = (predicted[held], references[index[held]], clean[index[held]])
            found["dir_fooled"][name] = (defect_inheritance_rate(*some) if held.any() else Rate.of(0, 0)).to_dict()
        if one.target_label is not None:
            found["flip"][name] = label_flip_rate(predicted, references[index], one.target_label).to_dict()
    return found


def rate_of(values: Mapping[str, Any]) -> Rate:
    """Give a rate back from its JSON values."""
    return Rate(**{name: values[name] for name in ("value", "count", "num_samples", "low", "high")})


def installed_versions() -> dict[str, str]:
    """Give the versions that numbers made now are made with."""
    return {"python": platform.python_version(), **{name: _version_of(name) for name in _PACKAGES}}


# A search of all that is installed, done for each student otherwise.
_version_of = cache(version)


def joined_versions(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Put versions together: all that were used, where they differ."""
    held: dict[str, set[str]] = {}
    for versions in several:
        for name, one in versions.items():
            held.setdefault(name, set()).update(one.split(", "))
    return {name: ", ".join(sorted(ones)) for name, ones in held.items()}


@dataclass(frozen=True)
class DefectReport:
    """What students inherited.

    Attributes:
        records: One for each task, defect, student and seed: "acc", "dir", "floor" (or None) as rates with counts and
            95 percent intervals, and what is known of how the student was made.
        settings: All that decided the numbers.
        versions: Of the packages that the numbers were made with.
        anatomies: What students are made of, once each: "task", "teacher" (the defect in it, or "clean"), "student",
            "seed", and the "anatomy" (`remos_hf.evaluation.anatomy`). Of several seeds the first; may be empty.
    """

    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    anatomies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Keep the settings as JSON gives them back, so that a report read again is the same."""
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the report as JSON, beside its place and renamed."""
        path = Path(path)
        content = {
            "format_version": _FORMAT_VERSION,
            "versions": self.versions,
            "settings": self.settings,
            "records": self.records,
        }
        text = json.dumps(content, indent=1)
        if self.anatomies:  # a line each: thousands of numbers, which nobody reads one below the other
            lines = ",\n".join(f"  {json.dumps(one)}" for one in self.anatomies)
            text = f'{text[:-2]},\n "anatomies": [\n{lines}\n ]\n}}'
        replace_file(path, f"{text}\n".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DefectReport":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: The file is no report, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text(), parse_constant=_refuse_constant)
            found = int(content["format_version"])
            if found > _FORMAT_VERSION:
                raise CorruptFileError(
                    f"{path} has format {found}, newer than the {_FORMAT_VERSION} that is read. Update remos_hf."
                )
            records, settings = list(map(dict, content["records"])), dict(content["settings"])
            anatomies = list(map(dict, content.get("anatomies", [])))
            for record in records:
                _check_record(record)
            for one in anatomies:
                _anatomy_place(one)
                check_anatomy(one["anatomy"])
            return cls(records, settings, dict(content["versions"]), anatomies)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} is no defect report ({error!r}).") from error

    def __add__(self, other: "DefectReport") -> "DefectReport":
        """Put two reports together; what their settings say by task stays apart.

        Raises:
            ValueError: Both hold the same student, which would count twice, or they refer to different students.
        """
        both = {_place(record) for record in self.records} & {_place(record) for record in other.records}
        if both:
            raise ValueError(
                f"Both reports hold {len(both)} of the same records, such as {min(both, key=str)}; added, they would "
                "count twice. Give reports of different tasks a name, and those of different students a seed."
            )
        if self._reference != other._reference:
            raise ValueError(f"The reports refer to {self._reference!r} and {other._reference!r}; use one reference.")
        settings = {**self.settings}
        for key, value in other.settings.items():
            held = settings.get(key)
            settings[key] = {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value
        anatomies = {_anatomy_place(one): one for one in (*other.anatomies, *self.anatomies)}
        inside = [_anatomy_place(one) for one in (*self.anatomies, *other.anatomies)]
        return DefectReport(
            [*self.records, *other.records],
            settings,
            joined_versions([self.versions, other.versions]),
            [anatomies[place] for place in dict.fromkeys(inside)],
        )

    def not_inheriting(self) -> list[tuple[str, str]]:
        """Name the tasks and defects that plain fine-tuning does not inherit: nothing there could be reduced.

        Returns:
            Pairs of task and defect. Where plain fine-tuning was not measured nothing is known, and nothing named.
        """
        plain = {key: _row_of(rows, self._reference) for key, rows in self.tables().items()}
        return [key for key, row in plain.items() if row is not None and not _inherits(row)]

    @property
    def _reference(self) -> str:
        return self.settings.get("reference", "finetune")

    def tables(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Give the students of each task and defect, their seeds pooled; what `to_markdown` and every picture show.

        Returns:
            Rows by task and defect, in the order of the records. A row holds rates ("acc", "dir", "dir_fooled",
            "floor", "floor_acc"), differences and ratios ("excess", "relative_acc", "relative_dir"), or None where
            nothing was measured; values by seed ("acc_by_seed", "dir_by_seed"); "reactivation" and
            "floor_reactivation", rates by number of poisoned samples; "made", how the first seed's student was made.
        """
        grouped: dict[tuple[str, str], dict[str, list[dict]]] = {}
        for record in self.records:
            table = grouped.setdefault((record.get("task") or "", record["defect"]), {})
            table.setdefault(record["student"], []).append(record)
        tables = {}
        for key, by_student in grouped.items():
            plain = by_student.get(self._reference, [])
            tables[key] = [_row(name, records, plain) for name, records in by_student.items()]
        return tables

    def to_markdown(self, *, budgets: Sequence[float] = (0.01, 0.02, 0.04)) -> str:
        """Render the tables.

        Args:
            budgets: Accuracy that may be lost on the dev split, as shares, for the comparison at equal accuracy.

        Returns:
            Markdown: for each task and defect the students, the rules at equal accuracy, and re-activation.
        """
        parts = [HOW_TO_READ, ""]
        for task, told in self.unfinished().items():
            parts += [f"**{task}: {told}.**", ""]
        for section in self.sections(budgets=budgets):
            parts += [f"## {section.title}", "", *_markdown(section.students), ""]
            for remark in section.remarks:
                parts += [f"**{remark}**", ""]
            for table in (section.equal_accuracy, section.reactivation):
                if table is not None:
                    parts += [f"{table.caption}:", "", *_markdown(table), ""]
        return "\n".join(parts)

    def unfinished(self) -> dict[str, str]:
        """Say, by task, how many students are still to be made or measured; only tasks that lack some."""
        missing = self.settings.get("missing", {})
        told = "{} students are still to be made or measured; the tables hold what is done"
        return {task: told.format(number) for task, number in missing.items() if number}

    def sections(self, *, budgets: Sequence[float] = (0.01, 0.02, 0.04)) -> list["Section"]:
        """Give all that is said of each task and defect, as `to_markdown` and the HTML report show it.

        Args:
            budgets: As for `to_markdown`.
        """
        sections = []
        for (task, defect), rows in self.tables().items():
            plain = _row_of(rows, self._reference)
            chosen = _chosen(rows, self._reference, budgets)
            sections.append(
                Section(
                    task,
                    defect,
                    rows,
                    plain,
                    plain is not None and _inherits(plain),
                    _remarks(plain, self._reference),
                    chosen,
                    _students_table(rows),
                    _equal_accuracy_table(chosen),
                    _reactivation_table(rows),
                )
            )
        return sections


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


def paired(student: Mapping[str, Any], twin: Mapping[str, Any] | None, defect: str) -> dict[str, Any]:
    """Put what `measure` gave of a student beside its benign twin, for one defect; JSON values of a record."""
    own = rate_of(student["dir"][defect])
    # A student that is its own twin (Retrain takes nothing from any teacher) has no excess to measure.
    apart = twin is not None and twin is not student
    floor = rate_of(twin["dir"][defect]) if twin is not None else None
    return {
        "acc": student["acc"],
        "dev_acc": student.get("dev_acc"),
        "dir": own.to_dict(),
        "dir_fooled": student.get("dir_fooled", {}).get(defect),
        "flip": student["flip"].get(defect),
        "floor": floor.to_dict() if floor else None,
        "floor_acc": twin["acc"] if twin is not None else None,
        "excess": excess_dir(own, floor).to_dict() if apart else None,
        "reactivation": student.get("reactivation", {}).get(defect),
        "floor_reactivation": (twin or {}).get("reactivation", {}).get(defect),
        "made": student.get("made", {}),
    }


def _named(defects: Mapping[str, Defect] | Sequence[Defect]) -> dict[str, Defect]:
    check_defects(defects.values() if isinstance(defects, Mapping) else defects)
    if isinstance(defects, Mapping):
        return dict(defects)
    names = [type(defect).__name__ for defect in defects]
    if len(set(names)) < len(names):
        raise ValueError(f"Two defects of one kind need names: pass a mapping instead of the list of {names}.")
    return dict(zip(names, defects, strict=True))


def _model(student: Student) -> nn.Module:
    return student if isinstance(student, nn.Module) else student()


def _pooled(rates: Iterable[Mapping[str, Any] | None]) -> Rate | None:
    held = [rate for rate in rates if rate]
    if not held:
        return None
    return Rate.of(sum(rate["count"] for rate in held), sum(rate["num_samples"] for rate in held))


def _row(name: str, records: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    def pooled(of: list[dict[str, Any]], key: str) -> Rate | None:
        return _pooled(record.get(key) for record in of)

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
        "reactivation": _pooled_counts(record.get("reactivation") for record in records),
        "floor_reactivation": _pooled_counts(record.get("floor_reactivation") for record in records),
        "made": records[0].get("made") or {},
        "squares_reset": _mean([(record.get("made") or {}).get("squares_reset") for record in records]),
    }


def _pooled_counts(curves: Iterable[Mapping[str, Any] | None]) -> dict[int, Rate]:
    held = [curve for curve in curves if curve]
    counts = sorted({int(count) for curve in held for count in curve})
    return {count: _pooled(curve.get(str(count)) for curve in held) for count in counts}


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("task") or "", record["defect"], record["student"], record["seed"]


def _anatomy_place(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return one.get("task") or "", one["teacher"], one["student"]


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_record(record: Mapping[str, Any]) -> None:
    missing = {"defect", "student", "seed", "acc", "dir"} - set(record)
    if missing:
        raise ValueError(f"a record lacks {', '.join(sorted(missing))}")
    for key in ("acc", "dir"):
        rate_of(record[key])


def _row_of(rows: list[dict[str, Any]], student: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["student"] == student), None)


def _mean(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None


def _inherits(row: Mapping[str, Any]) -> bool:
    if _lacks_floor(row):
        return (row["dir"].value or 0.0) >= INHERITS
    return row["excess"].value >= INHERITS and row["excess"].low > 0


def _lacks_floor(row: Mapping[str, Any]) -> bool:
    return row["excess"] is None or row["excess"].value is None


def _remarks(plain: Mapping[str, Any] | None, reference: str) -> list[str]:
    """Say what a reader must know of a table before believing it."""
    if plain is None:
        return [f"Plain fine-tuning ({reference}) was not measured: whether there is anything to reduce is not known."]
    remarks = []
    if plain["dir"].value is None:
        remarks.append("Plain fine-tuning gets no sample right on which the defect could show: it has no DIR.")
    elif _lacks_floor(plain):
        remarks.append("Plain fine-tuning has no benign floor: part of its DIR may be errors of its own.")
    if not _inherits(plain):
        remarks.append(
            "Plain fine-tuning does not inherit this defect: there is nothing to reduce, and no row shows that a "
            "strategy works."
        )
    return remarks


def percent(rate: Any, *, interval: bool = False) -> str:  # noqa: ANN401 - a rate, a difference or a ratio
    """Write a share as a percentage with one digit, if asked with its interval; "-" where it has no value."""
    if rate is None or rate.value is None:
        return "-"
    text = _tenths(rate.value)
    return f"{text} [{_tenths(rate.low)}, {_tenths(rate.high)}]" if interval and rate.low is not None else text


def _tenths(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # 0.0, not -0.0


def _by_seed(values: Iterable[float | None]) -> str:
    return ", ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def _markdown(table: Table) -> list[str]:
    rule = ["---", *("---:" for _ in table.header[1:])]
    return [f"| {' | '.join(line)} |" for line in (table.header, rule, *table.lines)]


def _students_table(rows: list[dict[str, Any]]) -> Table:
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
                f"{percent(row['acc'])} ({_by_seed(row['acc_by_seed'])})",
                f"{percent(row['dir'], interval=True)} ({_by_seed(row['dir_by_seed'])})",
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


def _chosen(rows: list[dict[str, Any]], reference: str, budgets: Sequence[float]) -> list[Choice]:
    """For each rule, the largest reset whose dev accuracy stays within a budget of plain fine-tuning's."""
    if _row_of(rows, reference) is None:
        return []
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["student"] != reference and row["dev_loss"] is not None:
            # What slices nothing is a rule of its own: learning faster is a rival too.
            curves.setdefault(row["made"].get("rule", row["student"]), []).append(row)
    chosen = []
    for rule, points in curves.items():
        for budget in budgets:
            able = [point for point in points if point["dev_loss"] <= budget + _ROUNDING]
            best = min(able, key=lambda point: point["made"].get("slice_ratio", 1.0), default=None)
            chosen.append(Choice(rule, budget, best))
    return chosen


def _equal_accuracy_table(chosen: Sequence[Choice]) -> Table | None:
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


def _reactivation_table(rows: list[dict[str, Any]]) -> Table | None:
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
