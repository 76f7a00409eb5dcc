"""An audit: implant defects into a teacher, make every student, measure. Killed at any point, it goes on where it was.

Each teacher and each measured student is a file of its own, written whole; several processes share the work by locks.
How a student is trained is the caller's: this room does not know the trainers.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments

from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import Defect, ExposedSet
from remos_hf.errors import CorruptFileError, NonFiniteError, RemosError
from remos_hf.evaluation.measures import accuracy
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.reactivation import Reactivation, reactivate
from remos_hf.evaluation.report import DefectReport, installed_versions, joined_versions
from remos_hf.evaluation.tasks import Task, without_map_bars
from remos_hf.evaluation.transfer import measure, paired
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.plain import Retrain
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.whole import replace_file

logger = logging.getLogger(__name__)

CLEAN = "clean"
_SETTINGS_FILE = "settings.json"
_MADE_FILE = "made.json"
_WEIGHTS_FILE = "model.safetensors"
_WAIT = 2.0  # seconds until a process looks again for work that another one holds


# Trains a student in place: (student, strategy, data, lr_factor, seed) -> JSON facts about how it was made. Of these,
# "anatomy" is kept apart and reported once, and "seconds" may tell what the time went to: "profile", "choose", "reset".
FineTune = Callable[[nn.Module, Strategy, Dataset, float, int], dict[str, Any]]


@dataclass(frozen=True)
class Audit:
    """All that decides an audit's numbers.

    Attributes:
        name: Of the setting, such as "SST-2 to IMDB".
        task: How samples are read.
        attacker: The samples that teachers are made with.
        student: The samples that students are trained on.
        dev: Clean samples that every choice is made on.
        test: Clean samples, exposed and measured.
        defects: By name. Backdoors are implanted; others are searched for on the clean teacher.
        students: By name. Plain fine-tuning is "finetune".
        seeds: One teacher and one student of each kind a seed.
        load_teacher: Gives the public model with a head for the attacker's task, from a seed.
        teacher_args: Gives the arguments of the Trainer that makes a teacher, from a seed and a folder.
        start_student: Gives a student from a teacher and a seed: its body under a new head.
        fine_tune: Trains a student.
        settings: What else the caller chose, as JSON values: file names, subsets, learning rates.
        reactivation: How students are re-tuned.
    """

    name: str
    task: Task
    attacker: Dataset
    student: Dataset
    dev: Dataset
    test: Dataset
    defects: Mapping[str, Defect]
    students: Mapping[str, StudentPlan]
    seeds: Sequence[int]
    load_teacher: Callable[[int], nn.Module]
    teacher_args: Callable[[int, str], TrainingArguments]
    start_student: Callable[[nn.Module, int], nn.Module]
    fine_tune: FineTune
    settings: Mapping[str, Any] = field(default_factory=dict)
    reactivation: Reactivation = field(default_factory=Reactivation)

    def __post_init__(self) -> None:
        """Refuse audits that would decide nothing."""
        if CLEAN in self.defects:
            raise ValueError(f"{CLEAN!r} is the name of the never-poisoned teacher; name the defect otherwise.")
        unknown = {name for plan in self.students.values() for name in plan.defects or ()} - set(self.defects)
        if unknown:
            raise ValueError(f"Students are planned for {sorted(unknown)}, but the defects are {sorted(self.defects)}.")
        if not self.students or not self.seeds or not self.defects:
            raise ValueError("An audit needs at least one defect, one student and one seed.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are different numbers: one given twice would count twice, but got {self.seeds}.")
        unfit = [name for name in (*self.defects, *self.students) if not name or set(name) & set("/\\:")]
        if unfit:
            raise ValueError(f"Names of defects and students become file names, but got {unfit[0]!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Give all that decides the numbers as JSON values, the data by their hashes."""
        parts = {"attacker": self.attacker, "student": self.student, "dev": self.dev, "test": self.test}
        return {
            "name": self.name,
            **self.task.to_dict(),
            "data": {name: {"num_samples": len(part), "sha256": _hash_of(part)} for name, part in parts.items()},
            "defects": {name: defect.to_dict() for name, defect in self.defects.items()},
            "students": {name: plan.to_dict() for name, plan in self.students.items()},
            "seeds": list(self.seeds),
            "reactivation": asdict(self.reactivation),
            **self.settings,
        }


@dataclass(frozen=True)
class _Cell:
    kind: str  # CLEAN, or the name of the backdoor in the teacher
    seed: int
    student: str

    @property
    def file(self) -> str:
        return f"{self.kind}-{self.seed}-{self.student}.json"


def run_audit(
    audit: Audit,
    folder: str | os.PathLike,
    *,
    workers: int = 1,
    keep_students: bool = False,
    progress: bool = True,
) -> DefectReport:
    """Make and measure what is not there yet, and report all of it.

    Run the same command in several processes to share the work. What a killed run had finished is kept; a student that
    it was making is made again from the start.

    Args:
        audit: What to do.
        folder: Where teachers, students' measures and exposed sets are kept.
        workers: Processes that search for found defects.
        keep_students: Save the students too, so that a defect added later needs no new ones.
        progress: Show a bar on runs longer than two seconds, and log each student.

    Returns:
        The report over all cells that are done; another process may still hold some.

    Raises:
        RemosError: The folder holds an audit with other settings.
        NonFiniteError: A student's training diverged; names it.
    """
    folder = Path(folder)
    _check_settings(audit, folder)
    run = _Run(audit, folder, workers, keep_students, progress)
    waiting = list(_cells(audit))
    bar = tqdm(total=len(waiting), desc="audit", unit="student", delay=2, disable=not progress)
    with bar, without_map_bars():
        while waiting:
            held = []
            for cell in waiting:
                if run.do(cell):
                    bar.update()
                else:
                    held.append(cell)
            if len(held) == len(waiting):
                time.sleep(_WAIT)
            waiting = held
    return report_of(audit, folder)


def report_of(audit: Audit, folder: str | os.PathLike) -> DefectReport:
    """Report the cells that are done, making nothing.

    Args:
        audit: The audit.
        folder: Where it was run.
    """
    folder = Path(folder)
    done = {cell: _read(folder / "cells" / cell.file) for cell in _cells(audit)}
    shown = {cell: _as_asked(audit, cell, found) for cell, found in done.items() if found is not None}
    records = []
    for name, defect in audit.defects.items():
        for student, plan in audit.students.items():
            for seed in audit.seeds if plan.defects is None or name in plan.defects else ():
                cell, twin = _pair_of(audit, name, defect, student, seed)
                both = [shown.get(one) for one in (cell, twin) if one is not None]
                if any(one is None or name not in one["dir"] for one in both):
                    continue
                record = paired(shown[cell], shown[twin] if twin is not None else None, name)
                records.append({"task": audit.name, "defect": name, "student": student, "seed": seed, **record})
    settings = {"reference": "finetune", "audits": {audit.name: audit.to_dict()}}
    teachers = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "teachers").glob("*.json"))}
    settings["teachers"] = {audit.name: teachers}
    anatomies = _anatomies(audit, shown)
    settings["missing"] = {audit.name: sum(not _is_done(audit, cell, found) for cell, found in done.items())}
    made_with = [found["versions"] for found in done.values() if found and "versions" in found]
    return DefectReport(records, settings, joined_versions(made_with or [installed_versions()]), anatomies)


def _anatomies(audit: Audit, done: Mapping[_Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give what students are made of, each of the first seed that tells it."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for cell, found in done.items():
        if found.get("anatomy") and (cell.kind, cell.student) not in first:
            about = {"task": audit.name, "teacher": cell.kind, "student": cell.student, "seed": cell.seed}
            first[cell.kind, cell.student] = {**about, "anatomy": found["anatomy"]}
    return list(first.values())


def _pair_of(audit: Audit, name: str, defect: Defect, student: str, seed: int) -> tuple[_Cell, _Cell | None]:
    """Give the cell that shows a defect, and its benign twin."""
    plan = audit.students[student]
    if not isinstance(defect, Backdoor):
        # No teacher is without its adversarial inputs: the floor is a student that took nothing from it.
        retrained = next(
            (
                one
                for one, other in audit.students.items()
                if isinstance(other.strategy, Retrain) and (other.defects is None or name in other.defects)
            ),
            None,
        )
        return _Cell(CLEAN, seed, student), _Cell(CLEAN, seed, retrained) if retrained else None
    kind = CLEAN if isinstance(plan.strategy, Retrain) else name
    return _Cell(kind, seed, student), _Cell(CLEAN, seed, student)


def _cells(audit: Audit) -> Iterator[_Cell]:
    backdoors = [name for name, defect in audit.defects.items() if isinstance(defect, Backdoor)]
    for seed in audit.seeds:
        for kind in (CLEAN, *backdoors):
            for student, plan in audit.students.items():
                if kind != CLEAN and isinstance(plan.strategy, Retrain):
                    continue  # it takes nothing from any teacher: one serves all
                if kind == CLEAN or plan.defects is None or kind in plan.defects:
                    yield _Cell(kind, seed, student)


def _wanted(audit: Audit, cell: _Cell) -> list[str]:
    """Name the defects that a student is measured on."""
    plan = audit.students[cell.student]
    shown = list(audit.defects) if cell.kind == CLEAN else [cell.kind]
    return [name for name in shown if plan.defects is None or name in plan.defects]


def _retuned(audit: Audit, cell: _Cell) -> list[str]:
    """Name the backdoors whose re-activation is measured on a student."""
    seeds = audit.reactivation.seeds
    if not audit.students[cell.student].reactivate or (seeds is not None and cell.seed not in seeds):
        return []
    return [name for name in _wanted(audit, cell) if isinstance(audit.defects[name], Backdoor)]


def _curves(audit: Audit, found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the re-activation that was measured as this audit asks."""
    plan = _retuning(audit.reactivation)
    if found.get("retuned_as", plan) != plan:
        return {}
    counts = {str(count) for count in plan["counts"]}
    return {name: curve for name, curve in found["reactivation"].items() if set(curve) == counts}


def _as_asked(audit: Audit, cell: _Cell, found: Mapping[str, Any]) -> dict[str, Any]:
    """Give what is known of a student without re-activation that is no part of this audit."""
    curves = _curves(audit, found)
    return {**found, "reactivation": {name: curves[name] for name in _retuned(audit, cell) if name in curves}}


def _is_done(audit: Audit, cell: _Cell, found: Mapping[str, Any] | None) -> bool:
    if found is None:
        return False
    return set(_wanted(audit, cell)) <= set(found["dir"]) and set(_retuned(audit, cell)) <= set(_curves(audit, found))


class _Run:
    """One process's share of an audit."""

    def __init__(self, audit: Audit, folder: Path, workers: int, keep_students: bool, progress: bool) -> None:
        self.audit, self.folder, self.workers, self.progress = audit, folder, workers, progress
        self.keep_students = keep_students
        self._teachers: dict[tuple[str, int], nn.Module] = {}
        self._exposed: dict[tuple[str, int], ExposedSet] = {}
        for room in ("cells", "teachers", "students", "locks"):
            (folder / room).mkdir(parents=True, exist_ok=True)

    def do(self, cell: _Cell) -> bool:
        """Make and measure a student unless that is done; False if another process holds what it needs."""
        path = self.folder / "cells" / cell.file
        if _is_done(self.audit, cell, _read(path)):
            return True
        try:
            with self._lock(cell.file):
                before = _read(path)
                if _is_done(self.audit, cell, before):
                    return True
                try:
                    found = self._measured(cell, before)
                except NonFiniteError as error:
                    raise NonFiniteError(
                        f"Student {cell.student!r} of {cell.kind!r}, seed {cell.seed}: {error}"
                    ) from error
                replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        except Timeout:
            return False
        if self.progress:
            logger.info("%s %s seed %d: ACC %.1f %%", cell.kind, cell.student, cell.seed, 100 * found["acc"]["value"])
        return True

    def _lock(self, name: str) -> FileLock:
        # The system frees it when the process dies, so a killed run leaves nothing to clean up.
        return FileLock(self.folder / "locks" / f"{name}.lock", timeout=0)

    def _teacher(self, kind: str, seed: int) -> nn.Module:
        key = (kind, seed)
        if key not in self._teachers:
            place = self.folder / "teachers" / f"{kind}-{seed}"
            if not place.is_dir():
                finetuned = None if kind == CLEAN else self._teacher(CLEAN, seed)
                with self._lock(place.name):
                    if not place.is_dir():
                        self._make_teacher(kind, seed, place, finetuned)
            model = _load_whole(self.audit.load_teacher(seed), place)
            self._teachers = {other: held for other, held in self._teachers.items() if other == (CLEAN, seed)}
            self._teachers[key] = model.eval()
        return self._teachers[key]

    def _make_teacher(self, kind: str, seed: int, place: Path, finetuned: nn.Module | None) -> None:
        audit, task, start = self.audit, self.audit.task, time.perf_counter()
        teacher = audit.load_teacher(seed)
        with tempfile.TemporaryDirectory(prefix="remos_hf_") as output:
            args = audit.teacher_args(seed, output)
            if kind == CLEAN:
                task.train(teacher, audit.attacker, args)
            else:
                options = {"args": args, "finetuned": finetuned, **task.implanting}
                audit.defects[kind].implant(teacher, audit.attacker, **options)
        seconds = time.perf_counter() - start
        # On the student's test data: what its students could inherit there.
        exposed = {kind: self._exposed_set(kind, seed)} if kind != CLEAN else {}
        found = {**measure(teacher, audit.test, exposed, task, progress=False), "seconds": seconds}
        found["versions"] = installed_versions()
        replace_file(place.parent / f"{place.name}.json", (json.dumps(found, indent=1) + "\n").encode())
        _save_whole(teacher, place)

    def _exposed_set(self, name: str, seed: int) -> ExposedSet:
        defect = self.audit.defects[name]
        # A backdoor's is the same for all seeds of the training; an adversarial one is searched for on each teacher.
        key = (name, -1 if isinstance(defect, Backdoor) else seed)
        if key not in self._exposed:
            options = {"cache": self.folder / "exposed", "workers": self.workers, **self.audit.task.exposing}
            if isinstance(defect, Backdoor):
                self._exposed[key] = defect.exposed_set(self.audit.test, **options)
            else:
                teacher = self._teacher(CLEAN, seed)
                with self._lock(f"exposed-{name}-{seed}"):  # hours of searching, by one process
                    self._exposed[key] = defect.exposed_set(self.audit.test, teacher=teacher, **options)
        return self._exposed[key]

    def _measured(self, cell: _Cell, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Measure a student on what it was not measured on before."""
        audit, task, plan = self.audit, self.audit.task, self.audit.students[cell.student]
        # Before the student is trained: another process may hold one of them.
        shown = {name: self._exposed_set(name, cell.seed) for name in _wanted(audit, cell)}
        teacher = self._teacher(cell.kind, cell.seed)
        start = time.perf_counter()
        student, made = self._student(cell, teacher)
        trained = time.perf_counter()
        held: Mapping[str, Any] = before or {}
        again = _curves(audit, before) if before else {}
        new = {name: one for name, one in shown.items() if name not in held.get("dir", {})}
        found = measure(student, audit.test, new, task, progress=False)
        if before and found["acc"] != before["acc"]:
            # Made again, it came out as another one: its numbers are not put beside those of the first.
            before, held, again = None, {}, {}
            found = measure(student, audit.test, shown, task, progress=False)
        for key in ("dir", "flip", "dir_fooled"):
            found[key] = {**held.get(key, {}), **found[key]}
        on_dev = predict_labels(student, audit.dev, task, progress=False)
        found["dev_acc"] = accuracy(on_dev, list(audit.dev[task.label_column])).to_dict()
        asked = _retuned(audit, cell)
        if before and not asked:  # what another run asked for stays
            found |= {key: before[key] for key in ("reactivation", "retuned_as") if key in before}
        else:
            curves = {
                name: self._reactivated(student, name, shown[name], cell.seed) for name in asked if name not in again
            }
            found |= {"reactivation": {**again, **curves}, "retuned_as": _retuning(audit.reactivation)}
        parts = made.get("seconds", {})
        # The caller's parts are in what making took: together they add up to it.
        seconds = {"train": max(0.0, trained - start - sum(parts.values())), **parts}
        seconds["measure"] = time.perf_counter() - trained
        anatomy = (before or {}).get("anatomy") or made.get("anatomy")
        made = {**_facts(plan), **made, "seconds": {key: round(value, 2) for key, value in seconds.items()}}
        made.pop("anatomy", None)
        found["made"] = before["made"] if before else made
        found |= {"anatomy": anatomy} if anatomy else {}
        versions = [installed_versions(), *([before["versions"]] if before and "versions" in before else [])]
        return {**found, "versions": joined_versions(versions)}

    def _student(self, cell: _Cell, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Make a student, or load it if it was kept; with the facts about how it was made."""
        audit, plan = self.audit, self.audit.students[cell.student]
        place = self.folder / "students" / cell.file.removesuffix(".json")
        if place.is_dir():
            student = _load_whole(audit.start_student(teacher, cell.seed), place)
            return student.eval(), json.loads((place / _MADE_FILE).read_text())
        student = audit.start_student(teacher, cell.seed)
        made = audit.fine_tune(student, plan.strategy, audit.student, plan.lr_factor, cell.seed)
        if self.keep_students:
            _save_whole(student, place, made)
        return student.eval(), made

    def _reactivated(self, student: nn.Module, name: str, exposed: ExposedSet, seed: int) -> dict[str, Any]:
        audit, defect = self.audit, self.audit.defects[name]
        rates = reactivate(
            student,
            defect.trigger,
            audit.student,
            test=audit.test,
            exposed=exposed,
            task=audit.task,
            plan=audit.reactivation,
            seed=seed,
        )
        return {str(count): rate.to_dict() for count, rate in rates.items()}


def _facts(plan: StudentPlan) -> dict[str, Any]:
    strategy = plan.strategy
    facts: dict[str, Any] = {"strategy": strategy.to_dict(), "lr_factor": plan.lr_factor}
    if isinstance(strategy, SliceAndReset):
        scope = f", {strategy.scope} scope" if strategy.rule == "remos" or strategy.scope != "model" else ""
        rows = ", rows mean" if strategy.embedding_rows != "keep" else ""
        rate = f", lr x{plan.lr_factor:g}" if plan.lr_factor != 1 else ""
        facts |= {"rule": f"{strategy.rule}{scope}{rows}{rate}", "slice_ratio": strategy.slice_ratio}
    return facts


def _retuning(plan: Reactivation) -> dict[str, Any]:
    """Give what decides a student's re-activation, as JSON values."""
    return {name: one for name, one in json.loads(json.dumps(asdict(plan))).items() if name != "seeds"}


def _check_settings(audit: Audit, folder: Path) -> None:
    asked = json.loads(json.dumps(audit.to_dict()))
    path = folder / _SETTINGS_FILE
    held = json.loads(path.read_text()) if path.is_file() else asked
    before, now = _what_cells_hold(held), _what_cells_hold(asked)
    # More students, defects or seeds add cells; everything else would mix numbers that do not compare.
    for key in ("students", "defects"):
        now[key] = {name: one for name, one in now[key].items() if name in before[key]}
    curves, wanted = before.pop("reactivation"), now.pop("reactivation")
    # More counts make every curve anew.
    if curves and wanted and not set(curves["counts"]) < set(wanted["counts"]):
        before["reactivation"], now["reactivation"] = curves, wanted
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        raise RemosError(
            f"{folder} holds an audit with other settings ({', '.join(differing)} differ). Use another folder, or ask "
            "for the same audit to go on with it; students, defects and seeds may be added, not left out."
        )
    replace_file(path, (json.dumps(asked, indent=1) + "\n").encode())


def _what_cells_hold(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that decide what is in the cells; which there are, and which seeds, may grow."""
    plans = settings["students"]
    held = {key: value for key, value in settings.items() if key != "seeds"}
    held["students"] = {
        name: {key: one for key, one in plan.items() if key not in ("reactivate", "defects")}
        for name, plan in plans.items()
    }
    asked = any(plan["reactivate"] for plan in plans.values())
    retuning = {key: value for key, value in settings["reactivation"].items() if key != "seeds"}
    held["reactivation"] = retuning if asked else None
    return held


def _save_whole(model: nn.Module, place: Path, made: Mapping[str, Any] | None = None) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(beside)
        else:
            save_model(model, str(beside / _WEIGHTS_FILE))
        (beside / _MADE_FILE).write_text(json.dumps(made or {}))
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _load_whole(like: nn.Module, place: Path) -> nn.Module:
    """Load what was saved; `like` is a model of the same kind, which a plain module's weights are put into."""
    if isinstance(like, PreTrainedModel):
        return type(like).from_pretrained(place, local_files_only=True)
    load_model(like, place / _WEIGHTS_FILE)
    return like


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(
            f"{path} is no measured student ({error}). Delete it and run the audit again."
        ) from error


def _hash_of(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
