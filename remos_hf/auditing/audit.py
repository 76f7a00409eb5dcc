"""All that decides an audit's numbers: which defects, which students, on which data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset
from torch import nn
from transformers import TrainingArguments

from remos_hf.auditing.fingerprint import fingerprint
from remos_hf.auditing.labels import by_name
from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.base import Defect, check_defects
from remos_hf.evaluation.reactivation import Reactivation
from remos_hf.evaluation.tasks import Task
from remos_hf.strategies.base import Strategy

CLEAN = "clean"  # instead of a defect's name: the never-poisoned teacher

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
        told: What the report says besides and what decides no number, as JSON values: the command, caps.
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
    told: Mapping[str, Any] = field(default_factory=dict)
    reactivation: Reactivation = field(default_factory=Reactivation)

    def __post_init__(self) -> None:
        """Refuse audits that would decide nothing."""
        check_defects(self.defects.values())
        if CLEAN in self.defects:
            raise ValueError(f"{CLEAN!r} is the name of the never-poisoned teacher; name the defect otherwise.")
        unknown = {name for plan in self.students.values() for name in plan.defects or ()} - set(self.defects)
        if unknown:
            raise ValueError(f"Students are planned for {sorted(unknown)}, but the defects are {sorted(self.defects)}.")
        if not self.students or not self.seeds or not self.defects:
            raise ValueError("An audit needs at least one defect, one student and one seed.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are different numbers: one given twice would count twice, but got {self.seeds}.")
        self._settle_classes()
        unfit = [name for name in (*self.defects, *self.students) if not name or set(name) & set("/\\:")]
        if unfit:
            raise ValueError(f"Names of defects and students become file names, but got {unfit[0]!r}.")

    def _settle_classes(self) -> None:
        """Give all samples the student's classes: a target label by name is then the same number in all of them."""
        column = self.task.label_column
        if isinstance(self.student.features[column], ClassLabel):
            for part in ("attacker", "dev", "test"):
                settled = by_name(
                    getattr(self, part), part, self.student, "student", other_task=part == "attacker", column=column
                )
                object.__setattr__(self, part, settled)

    def to_dict(self) -> dict[str, Any]:
        """Give all that decides the numbers as JSON values, the data by their hashes."""
        parts = {"attacker": self.attacker, "student": self.student, "dev": self.dev, "test": self.test}
        return {
            "name": self.name,
            **self.task.to_dict(),
            "data": {name: {"num_samples": len(part), "sha256": fingerprint(part)} for name, part in parts.items()},
            "defects": {name: defect.to_dict() for name, defect in self.defects.items()},
            "students": {name: plan.to_dict() for name, plan in self.students.items()},
            "seeds": list(self.seeds),
            "reactivation": self.reactivation.to_dict(),
            **self.settings,
        }
