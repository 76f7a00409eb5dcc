"""Run an audit: implant, train, expose, measure. Killed at any point, it goes on where it was.

Each teacher and each measured student is a file of its own, written whole; several processes share the work by locks.
How a student is trained is the caller's: this module does not know the trainers.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from remos_hf.auditing.audit import CLEAN, Audit
from remos_hf.auditing.cells import Cell, cells_of, curves_of, is_done, read_cell, retuned, retuning, wanted
from remos_hf.auditing.collected import report_of
from remos_hf.auditing.made import made_by
from remos_hf.auditing.progress import Progress
from remos_hf.auditing.settings import settle_settings
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import ExposedSet
from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.measures import accuracy
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.reactivation import reactivate
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.evaluation.transfer import measure
from remos_hf.judging.report import DefectReport, installed_versions, joined_versions
from remos_hf.whole import replace_file, settle, whole_folder

logger = logging.getLogger(__name__)

_MADE_FILE = "made.json"
_WEIGHTS_FILE = "model.safetensors"
_ROOMS = ("cells", "teachers", "students", "locks")
_TRAINER_FOLDER = "trainer"
_SHOWN = ("dir", "flip", "flip_clean", "dir_fooled", "outcomes")  # what is measured of each defect
_WAIT = 2.0  # seconds until a process looks again for work that another one holds


def run_audit(
    audit: Audit,
    folder: str | os.PathLike,
    *,
    workers: int = 1,
    keep_students: bool = False,
    progress: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> DefectReport:
    """Make and measure what is not there yet, and report all of it.

    Run the same command in several processes to share the work. What a killed run had finished is kept; a student that
    it was making is made again from the start.

    Args:
        audit: What to do.
        folder: Where teachers, students' measures and exposed sets are kept.
        workers: Processes that search for found defects.
        keep_students: Save the students too, so that a defect added later needs no new ones.
        progress: Show a bar on runs longer than two seconds.
        tell: Takes a line as each student ends: its accuracy, and how long the rest will take.

    Returns:
        The report over all cells that are done; another process may still hold some.

    Raises:
        RemosError: The folder holds an audit with other settings.
        NonFiniteError: A student's training diverged; names it.
    """
    folder = Path(folder)
    settle_settings(audit, folder)
    waiting = list(cells_of(audit))
    run = _Run(audit, folder, workers, keep_students, Progress(len(waiting), tell))
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


class _Run:
    """One process's share of an audit."""

    def __init__(self, audit: Audit, folder: Path, workers: int, keep_students: bool, progress: Progress) -> None:
        self.audit, self.folder, self.workers, self.progress = audit, folder, workers, progress
        self.keep_students = keep_students
        self._teachers: dict[tuple[str, int], nn.Module] = {}
        self._exposed: dict[tuple[str, int], ExposedSet] = {}
        for room in _ROOMS:
            (folder / room).mkdir(parents=True, exist_ok=True)
            settle(folder / room)
        settle(folder)

    def do(self, cell: Cell) -> bool:
        """Make and measure a student unless that is done; False if another process holds what it needs."""
        path = self.folder / "cells" / cell.file
        if is_done(self.audit, cell, read_cell(path)):
            self.progress.done += 1
            return True
        try:
            with self._lock(cell.file):
                before = read_cell(path)
                if is_done(self.audit, cell, before):
                    self.progress.done += 1
                    return True
                teachers, start = sum(self.progress.teacher_seconds), time.perf_counter()
                try:
                    found = self._measured(cell, before)
                except NonFiniteError as error:
                    raise NonFiniteError(
                        f"Student {cell.student!r} of {cell.kind!r}, seed {cell.seed}: {error}"
                    ) from error
                _write(path, found)
        except Timeout:
            return False
        took = time.perf_counter() - start - (sum(self.progress.teacher_seconds) - teachers)
        self.progress.ended(cell, found["acc"]["value"], took, self._teachers_left())
        return True

    def _teachers_left(self) -> int:
        places = {(cell.kind, cell.seed) for cell in cells_of(self.audit)}
        return sum(not (self.folder / "teachers" / f"{kind}-{seed}").is_dir() for kind, seed in places)

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
        teacher, poisoning = audit.load_teacher(seed), {}
        with whole_folder(place) as folder:
            args = audit.teacher_args(seed, str(folder / _TRAINER_FOLDER))  # where a killed run's is found and cleared
            if kind == CLEAN:
                task.train(teacher, audit.attacker, args)
            else:
                options = {"args": args, "finetuned": finetuned, "told": poisoning.update, **task.implanting}
                audit.defects[kind].implant(teacher, audit.attacker, **options)
            shutil.rmtree(folder / _TRAINER_FOLDER, ignore_errors=True)
            seconds = time.perf_counter() - start
            # On the student's test data: what its students could inherit there.
            exposed = {kind: self._exposed_set(kind, seed)} if kind != CLEAN else {}
            found = {**measure(teacher, audit.test, exposed, task, progress=False), "seconds": seconds}
            found |= {"exposed": _about(exposed), "versions": installed_versions()}
            found |= {"poisoning": poisoning} if poisoning else {}
            _write(place.with_name(f"{place.name}.json"), found)
            _save(teacher, folder)
        self.progress.teacher_seconds.append(time.perf_counter() - start)

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
                    exposed = defect.exposed_set(self.audit.test, teacher=teacher, **options)
                self._measure_teacher(teacher, seed, name, exposed)
                self._exposed[key] = exposed
        return self._exposed[key]

    def _measure_teacher(self, teacher: nn.Module, seed: int, name: str, exposed: ExposedSet) -> None:
        """Measure a clean teacher on what was found on it: it was made before there was anything to show it."""
        path = self.folder / "teachers" / f"{CLEAN}-{seed}.json"
        with self._lock(path.name):
            found = json.loads(path.read_text()) if path.is_file() else {}
            if name in found.get("exposed", {}):
                return
            new = measure(teacher, self.audit.test, {name: exposed}, self.audit.task, progress=False)
            new["exposed"] = _about({name: exposed})
            _write(path, {**new, **found, **{key: {**found.get(key, {}), **new[key]} for key in (*_SHOWN, "exposed")}})

    def _measured(self, cell: Cell, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Measure a student on what it was not measured on before."""
        audit, task, plan = self.audit, self.audit.task, self.audit.students[cell.student]
        # Before the student is trained: another process may hold one of them.
        shown = {name: self._exposed_set(name, cell.seed) for name in wanted(audit, cell)}
        teacher = self._teacher(cell.kind, cell.seed)
        start = time.perf_counter()
        student, made = self._student(cell, teacher)
        trained = time.perf_counter()
        held: Mapping[str, Any] = before or {}
        again = curves_of(audit, before) if before else {}
        new = {name: one for name, one in shown.items() if name not in held.get("dir", {})}
        found = measure(student, audit.test, new, task, progress=False)
        if before and found["acc"] != before["acc"]:
            # Made again, it came out as another one: its numbers are not put beside those of the first.
            before, held, again = None, {}, {}
            found = measure(student, audit.test, shown, task, progress=False)
        for key in _SHOWN:
            found[key] = {**held.get(key, {}), **found[key]}
        on_dev = predict_labels(student, audit.dev, task, progress=False)
        found["dev_acc"] = accuracy(on_dev, list(audit.dev[task.label_column])).to_dict()
        asked = retuned(audit, cell)
        if before and not asked:  # what another run asked for stays
            found |= {key: before[key] for key in ("reactivation", "retuned_as") if key in before}
        else:
            curves = {
                name: self._reactivated(student, name, shown[name], cell.seed) for name in asked if name not in again
            }
            found |= {"reactivation": {**again, **curves}, "retuned_as": retuning(audit.reactivation)}
        parts = made.get("seconds", {})
        # The caller's parts are in what making took: together they add up to it.
        seconds = {"train": max(0.0, trained - start - sum(parts.values())), **parts}
        seconds["measure"] = time.perf_counter() - trained
        anatomy = (before or {}).get("anatomy") or made.get("anatomy")
        made = {
            **made_by(plan.strategy.to_dict(), plan.lr_factor, cell.seed),
            **made,
            "seconds": {key: round(value, 2) for key, value in seconds.items()},
        }
        made.pop("anatomy", None)
        found["made"] = before["made"] if before else made
        found |= {"anatomy": anatomy} if anatomy else {}
        versions = [installed_versions(), *([before["versions"]] if before and "versions" in before else [])]
        return {**found, "versions": joined_versions(versions)}

    def _student(self, cell: Cell, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Make a student, or load it if it was kept; with the facts about how it was made."""
        audit, plan = self.audit, self.audit.students[cell.student]
        place = self.folder / "students" / cell.file.removesuffix(".json")
        if place.is_dir():
            student = _load_whole(audit.start_student(teacher, cell.seed), place)
            return student.eval(), json.loads((place / _MADE_FILE).read_text())
        student = audit.start_student(teacher, cell.seed)
        strategy = plan.strategy.with_seed(cell.seed)  # each seed of the audit has its own draws
        made = audit.fine_tune(student, strategy, audit.student, plan.lr_factor, cell.seed)
        if self.keep_students:
            with whole_folder(place) as folder:
                _save(student, folder, made)
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


def _about(exposed: Mapping[str, ExposedSet]) -> dict[str, dict[str, Any]]:
    """Say of each exposed set how it was made, what was left out included."""
    return {name: {"num_exposed": len(one), **one.facts} for name, one in exposed.items()}


def _write(path: Path, found: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(found, indent=1) + "\n").encode())


def _save(model: nn.Module, folder: Path, made: Mapping[str, Any] | None = None) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / _WEIGHTS_FILE))
    (folder / _MADE_FILE).write_text(json.dumps(made or {}))


def _load_whole(like: nn.Module, place: Path) -> nn.Module:
    """Load what was saved; `like` is a model of the same kind, which a plain module's weights are put into."""
    if isinstance(like, PreTrainedModel):
        return type(like).from_pretrained(place, local_files_only=True)
    load_model(like, place / _WEIGHTS_FILE)
    return like
