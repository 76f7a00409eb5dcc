"""`remos audit`: implant defects into a teacher, make its students, measure what they inherit, and report it."""

import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.audit import Audit
from remos_hf.auditing.cells import cells_of, retuned
from remos_hf.auditing.collected import report_of
from remos_hf.auditing.data_files import drawn, read_data
from remos_hf.auditing.labels import by_name, classes_of, count_labels, label_names
from remos_hf.auditing.recipes import Recipe, StudentTuner
from remos_hf.auditing.run import run_audit
from remos_hf.auditing.settings import check_settings
from remos_hf.auditing.students import standard_students
from remos_hf.cli.answer import answered
from remos_hf.cli.audit_student import measure_student
from remos_hf.cli.command_line import command_line, shown_name
from remos_hf.cli.console import tell
from remos_hf.cli.defects_asked import (
    IMAGE_DEFECTS,
    TEXT_DEFECTS,
    chosen_defects,
    defects_of_images,
    defects_of_texts,
    target_of,
)
from remos_hf.cli.options import ALL, BEST_ON_IMAGES, BEST_ON_TEXTS, AuditOptions
from remos_hf.cli.profile import number_to_profile
from remos_hf.cli.report import report_files
from remos_hf.cli.teacher import Teacher, identity
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import Defect
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.over_seeds import MIN_SEEDS
from remos_hf.evaluation.reactivation import Reactivation
from remos_hf.evaluation.tasks import TextTask, without_map_bars
from remos_hf.judging.gates import MIN_SAMPLES
from remos_hf.judging.words import count_told
from remos_hf.strategies.plain import Finetune

_DEFAULT_DEFECTS = (("word", "sentence"), ("patch", "blended"))
_RULES = ("random", "remos")
_RULES_OF_IMAGES = (*_RULES, "+".join(BEST_ON_IMAGES))
_RULES_OF_TEXTS = (*_RULES, "+".join(BEST_ON_TEXTS))
_MAX_LENGTH = 64
_SAMPLES = 2000  # of each source: two rules and three seeds took about half an hour on two cores
_QUICK_SAMPLES = 1000
# The most that are used of what is there, and the shares of samples that all parts come from.
_MOST = {"test": 1000, "dev": 500}
_SHARES = {"test": 0.2, "dev": 0.1}
_SPLITS = ("train", "training", "data")
_COUNTS = (0, 20)  # poisoned samples, for re-activation
_FEW = (
    "The students' data has too few samples for all of re-activation: it is measured with fewer poisoned ones, or not."
)
_LESS_WITHOUT_GRADIENTS = 3  # a training step costs about three forward passes
_PROBED = (2, 6)  # batches


@dataclass(frozen=True)
class Plan:
    """What an audit will do.

    Attributes:
        audit: The audit.
        split: Where each part's samples come from, how many they are, and of how many.
        missing: Students to make, or to measure on what was added.
        teachers: Teachers to make.
        minutes: An estimate for both.
        measured_by: What the estimate was measured by.
        too_little: Why something will not be said, known before anything is made.
    """

    audit: Audit
    split: Mapping[str, Mapping[str, Any]]
    missing: int
    teachers: int
    minutes: float
    measured_by: str
    too_little: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as JSON values."""
        return {
            "split": dict(self.split),
            "defects": list(self.audit.defects),
            "students": list(self.audit.students),
            "seeds": list(self.audit.seeds),
            "teachers_to_make": self.teachers,
            "students_to_make": self.missing,
            "minutes": round(self.minutes, 1),
            "measured_by": self.measured_by,
            "too_little": list(self.too_little),
        }

    def __str__(self) -> str:
        """Tell the plan in a few lines."""
        parts = ", ".join(f"{name} {part['samples']:,} ({part['from']})" for name, part in self.split.items())
        make = f"{count_told(self.teachers, 'teacher')} and {count_told(self.missing, 'student')}"
        minutes = count_told(max(1, round(self.minutes)), "minute")
        left = f"To make: {make}, about {minutes} (measured by {self.measured_by})."
        return "\n".join(
            [
                f"Samples: {parts}\n{_caps_told(self.split)}Defects: {', '.join(self.audit.defects)}. "
                f"Seeds: {', '.join(map(str, self.audit.seeds))}.",
                f"Students: {', '.join(self.audit.students)}.",
                left if self.missing or self.teachers else "To make: nothing, all is done.",
                *self.too_little,
            ]
        )


def run(asked: AuditOptions, progress: bool) -> tuple[Any, ...]:
    """Plan an audit and run it; give what is told, as JSON values and as text, and the exit status if it is not 0."""
    if asked.student is not None:
        return measure_student(asked, progress)
    output = asked.output
    _check_folder(output)
    audit, split, teachers, students = _audit(asked)
    check_settings(audit, output)
    planned = _planned(audit, split, output, students, teachers)
    if asked.plan:
        return planned.to_dict(), str(planned)
    sys.stderr.write(f"{planned}\n")
    gc.freeze()  # Trainer collects garbage before each training: it need not look through all imports each time
    try:
        report = run_audit(audit, output, progress=progress, tell=_in_a_line)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"What was done is kept in {output}: the same command goes on from there.") from None
    finally:
        gc.unfreeze()
    path = report.save(output / "report.json")
    files = report_files(report, path)
    said, text, status = answered(report)
    told = {
        **said,
        "report": {name: str(file) for name, file in {"json": path, **files}.items()},
        "split": dict(split),
        "missing": report.settings["missing"][audit.name],
    }
    return told, f"{text}\n{_caps_told(split)}Saved {', '.join(told['report'].values())}", *status


def _in_a_line(text: str) -> None:
    with tqdm.external_write_mode(sys.stderr):  # above the bar, if there is one
        tell(text)


def _caps_told(split: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in a line of which sources not all samples are used; nothing if all are."""
    used: dict[str, int] = {}
    for part in split.values():
        used[part["from"]] = used.get(part["from"], 0) + part["samples"]
    held = {part["from"]: part["of"] for part in split.values()}
    cut = [f"{used[source]:,} of {held[source]:,} of {source}" for source in held if used[source] < held[source]]
    most = f"at most {_MOST['test']:,} to test, {_MOST['dev']} for choices"
    return f"Not all samples are used: {'; '.join(cut)} (--max-samples; {most}).\n" if cut else ""


def _audit(asked: AuditOptions) -> tuple[Audit, dict[str, Any], Recipe, Recipe]:
    """Give the audit, where its samples come from, and how teachers and students are trained."""
    data, pools, max_length = asked.data, _pools(asked), asked.max_length or _MAX_LENGTH
    sources = {"test": asked.test_data or data, "dev": data, "attacker": asked.attacker_data or data, "student": data}
    most = asked.max_samples or (_QUICK_SAMPLES if asked.quick else _SAMPLES)
    parts = _parts(pools, sources, None if most == ALL else most)
    split = {
        part: {"from": source, "samples": len(parts[part]), "of": len(pools[source])}
        | ({"left_out": pools[source].info.description} if pools[source].info.description else {})
        for part, source in sources.items()
    }
    num_labels = {part: count_labels(pools[sources[part]], sources[part]) for part in ("attacker", "student")}
    names = {part: label_names(pools[sources[part]]) for part in num_labels}
    if min(num_labels.values()) < 2:
        raise ValueError("A classifier tells two labels or more apart, but all samples have label 0.")
    named = Teacher.named(asked.teacher, parts["attacker"], asked.revision)
    task = named.task(
        named.load(num_labels["attacker"]),
        parts["attacker"],
        batch_size=asked.batch_size,
        max_length=max_length,
        bf16=asked.bf16,
        augment="crop_and_flip",
    )
    common = {"batch_size": asked.batch_size, "eval_batch_size": 2 * asked.batch_size, "bf16": asked.bf16}
    common |= {"use_cpu": asked.cpu, "texts": not named.reads_images}
    teachers = Recipe(asked.learning_rate, asked.teacher_epochs, **common)
    students = Recipe(asked.learning_rate, asked.epochs, curve=True, **common)
    chosen = _defects(asked, task, classes_of(pools[data]), max_length)
    profiled = number_to_profile(asked.profile_samples, parts["student"], "--profile-samples")
    counts = (0,) if asked.quick else _counts(chosen, task, parts["student"])
    plan = Reactivation(counts=counts or (0,), learning_rate=asked.learning_rate, batch_size=asked.batch_size)
    audit = Audit(
        name=asked.name or _name(data),
        task=task,
        **parts,
        defects=chosen,
        students=standard_students(
            asked.slice_ratios[:1] if asked.quick else asked.slice_ratios,
            reactivate=bool(counts) and not asked.quick,
            rules=asked.students or (_RULES_OF_IMAGES if named.reads_images else _RULES_OF_TEXTS),
        ),
        seeds=asked.seeds[:1] if asked.quick else asked.seeds,
        load_teacher=lambda seed: named.load(num_labels["attacker"], seed, names["attacker"]),
        teacher_args=teachers.arguments,
        start_student=lambda model, seed: with_new_head(
            model, num_labels["student"], seed=seed, labels=names["student"]
        ),
        fine_tune=StudentTuner(task, students.arguments, profiled),
        settings={
            "teacher": identity(asked.teacher, asked.revision)["id"],
            "profile_samples": profiled,
            **{name: getattr(asked, name) for name in ("learning_rate", "epochs", "teacher_epochs", "batch_size")},
        },
        told={
            "command": command_line("audit", asked),
            "max_samples": most,
            "samples": {part: {**one, "from": shown_name(one["from"])} for part, one in split.items()},
            **({} if asked.quick or counts == _COUNTS else {"reactivation_left_out": _FEW}),
        },
        reactivation=plan,
    )
    return audit, split, teachers, students


def _pools(asked: AuditOptions) -> dict[str, Dataset]:
    """Read each source once. Classes have the numbers of the students' data."""
    read = {"text_columns": asked.text_columns, "label_column": asked.label_column}
    data, test = asked.data, asked.test_data
    pools = {source: read_data(source, **read) for source in {data, asked.attacker_data or data, test or data}}
    _check_same_kind(pools)
    return {
        source: pool if source == data else by_name(pool, source, pools[data], data, other_task=source != test)
        for source, pool in pools.items()
    }


def _check_folder(output: Path) -> None:
    """Refuse a folder that holds something else than an audit.

    Raises:
        FileExistsError: It does.
    """
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if held and not {"settings.json", "cells"} <= held:
        raise FileExistsError(
            f"{output} is not empty and holds no audit (it holds {', '.join(sorted(held)[:3])}). Name a new folder, or "
            "that of the audit to go on with."
        )


def _name(data: str) -> str:
    """Name the task after its data: a file that is called after its split alone gets its folder's name as well."""
    path = Path(data)
    if not path.exists():
        return data
    path = path.resolve()
    stem = Path(path.name.removesuffix(".gz")).stem if path.is_file() else path.name
    return f"{path.parent.name}/{stem}" if stem in _SPLITS and path.parent.name else stem


def _parts(pools: Mapping[str, Dataset], sources: Mapping[str, str], max_samples: int | None) -> dict[str, Dataset]:
    """Draw the four parts. Those that come from the same samples do not overlap."""
    parts, taken = {}, dict.fromkeys(pools, 0)
    for part, source in sources.items():
        pool = pools[source]
        held = len(pool) if max_samples is None else min(max_samples, len(pool))
        sharing = [one for one in sources if sources[one] == source]
        left = held - taken[source]
        if part in _SHARES:
            number = min(_MOST[part], left if sharing == [part] else round(held * _SHARES[part]))
        elif part == "attacker" and "student" in sharing:
            number = left // 2
        else:
            number = left
        if number < 1:
            raise ValueError(
                f"{source}: {held} samples are too few for the parts {', '.join(sharing)}. Give more data."
            )
        parts[part] = drawn(pool, number, seed=0, skip=taken[source])
        taken[source] += number
    return parts


def _check_same_kind(pools: Mapping[str, Dataset]) -> None:
    first, *others = pools.items()
    for source, pool in others:
        kinds = [set(one.column_names) - {"text_pair"} for one in (first[1], pool)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{first[0]} holds {sorted(kinds[0])}, but {source} holds {sorted(kinds[1])}.")


def _defects(
    asked: AuditOptions, task: TextTask | ImageTask, classes: Sequence[str], max_length: int
) -> dict[str, Defect]:
    images = isinstance(task, ImageTask)
    target = target_of(asked, classes, images=images)
    if isinstance(task, TextTask):
        known, makers = TEXT_DEFECTS, defects_of_texts(asked, target, task.text_columns, max_length)
    else:
        known, makers = IMAGE_DEFECTS, defects_of_images(asked, target)
    return chosen_defects(asked, asked.defects or _DEFAULT_DEFECTS[images], known, makers, images=images)


def _counts(defects: Mapping[str, Defect], task: TextTask | ImageTask, samples: Dataset) -> tuple[int, ...]:
    """Give the numbers of poisoned samples that the students' data has for re-activation; none if it has too few."""
    labels, room = samples[task.label_column], len(samples)
    for defect in defects.values():
        if isinstance(defect, Backdoor):
            able = task.able(defect.trigger, samples)
            others = sum(can and label != defect.trigger.target_label for can, label in zip(able, labels, strict=True))
            room = min(room, others)
    counts = tuple(count for count in _COUNTS if count <= room and len(samples) >= Reactivation().num_clean)
    if counts != _COUNTS:
        warnings.warn(f"{_FEW} (remos_hf)", stacklevel=2)
    return counts


def _planned(audit: Audit, split: Mapping[str, Any], folder: Path, students: Recipe, teachers: Recipe) -> Plan:
    so_far = report_of(audit, folder)
    missing = so_far.settings["missing"][audit.name]
    kinds = ["clean", *(name for name, defect in audit.defects.items() if isinstance(defect, Backdoor))]
    to_make = sum(not (folder / "teachers" / f"{kind}-{seed}").is_dir() for kind in kinds for seed in audit.seeds)
    steps = students.epochs * -(-len(audit.student) // students.batch_size)
    again = teachers.epochs * -(-len(audit.attacker) // teachers.batch_size)
    made = [record["made"]["seconds"] for record in so_far.records]
    if not missing and not to_make:
        return Plan(audit, split, 0, 0, 0.0, "nothing, since all is done")
    too_little = _too_little(audit)
    if made:
        a_student = statistics.median(sum(one.values()) for one in made)
        a_teacher = statistics.median(one["train"] for one in made) / steps * again
        measured_by = f"the {len(made)} measures that are done"
    else:
        a_step, a_run = _seconds_of_a_step(audit, students)
        shown = len(audit.test) * (1 + len(audit.defects)) + len(audit.dev)
        a_student = a_run + a_step * (steps + shown / students.batch_size / _LESS_WITHOUT_GRADIENTS)
        a_student += _seconds_of_reactivation(audit, a_step, a_run)
        a_teacher = a_run + a_step * again
        measured_by = f"a student's first {_PROBED[1]} steps; what starts and holds add is not counted"
    minutes = (missing * a_student + to_make * a_teacher) / 60
    return Plan(audit, split, missing, to_make, minutes, measured_by, too_little)


def _too_little(audit: Audit) -> list[str]:
    """Say what the test samples and the seeds can not tell, whatever comes out."""
    told, labels = [], audit.test[audit.task.label_column]
    for name, defect in audit.defects.items():
        if isinstance(defect, Backdoor):
            able = audit.task.able(defect.trigger, audit.test)
            target = defect.trigger.target_label
            shown = sum(can and label != target for can, label in zip(able, labels, strict=True))
            if shown < MIN_SAMPLES:
                told.append(
                    f"Nothing will be said of {name}: {shown} of {len(labels)} test samples can show it, and "
                    f"{MIN_SAMPLES} are needed. Give more (--test-data, --max-samples)."
                )
    if len(audit.seeds) < MIN_SEEDS:
        told.append(f"Nothing will be compared: that takes {MIN_SEEDS} seeds (--seeds).")
    return told


def _seconds_of_reactivation(audit: Audit, a_step: float, a_run: float) -> float:
    """Estimate what re-activation takes of a student, on average over all of them."""
    plan, cells = audit.reactivation, [*cells_of(audit)]
    shown = 2 * min(plan.num_exposed, len(audit.test)) / plan.batch_size / _LESS_WITHOUT_GRADIENTS
    steps = [plan.epochs * -(-(plan.num_clean + count) // plan.batch_size) + shown for count in plan.counts]
    curves = sum(len(retuned(audit, cell)) for cell in cells) / len(cells)
    return curves * sum(a_run + a_step * one for one in steps)


def _seconds_of_a_step(audit: Audit, recipe: Recipe) -> tuple[float, float]:
    """Train a student for a few steps; the difference of two runs is that of steps alone, the rest what a run costs."""
    took = []
    with tempfile.TemporaryDirectory(prefix="remos_hf_"), without_map_bars():
        teacher = audit.load_teacher(audit.seeds[0])
        few = replace(recipe, epochs=1, curve=False)
        for batches in _PROBED:
            samples = audit.student.select(range(min(len(audit.student), batches * recipe.batch_size)))
            student: nn.Module = audit.start_student(teacher, audit.seeds[0])
            start = time.perf_counter()
            StudentTuner(audit.task, few.arguments)(student, Finetune(), samples, 1.0, audit.seeds[0])
            took.append(time.perf_counter() - start)
    steps = _PROBED[1] - _PROBED[0]
    # Too few samples for two runs that differ: then a whole run bounds it.
    a_step = (took[1] - took[0]) / steps if took[1] > took[0] else took[1] / _PROBED[1]
    return a_step, max(0.0, took[0] - _PROBED[0] * a_step)
