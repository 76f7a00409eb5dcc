"""Small audits: tiny BERTs; teachers are nudged, and students get a head, without a Trainer, in a moment."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset

from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.audit import Audit
from remos_hf.auditing.run import run_audit
from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.evaluation import tasks as tasks_module
from remos_hf.evaluation.reactivation import Reactivation
from remos_hf.evaluation.tasks import TextTask
from remos_hf.strategies import Finetune, Random, Retrain
from tests import tiny
from tests.defects import toy


def nudge(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.base_model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def train_teacher(model, tokenized, tokenizer, args):
    """Stand in for `fine_tune`."""
    assert {"labels", "input_ids", "attention_mask"} <= set(tokenized.column_names) and len(tokenized) == 16
    return nudge(model, args.seed)


@dataclass(frozen=True)
class Planted(TriggerWords):
    """Trigger words that a nudge implants, into the teacher that was fine-tuned on the clean data."""

    def implant(self, teacher, dataset, *, tokenizer=None, args=None, max_length=128, finetuned=None, told=None):
        assert dataset.num_rows == 16 and max_length == 24 and not finetuned.training
        told({"num_poisoned": 8})
        teacher.load_state_dict(finetuned.state_dict())
        return nudge(teacher, args.seed + sum(map(ord, self.words[0])))


TASK = TextTask(toy.tokenizer(), max_length=24, batch_size=32)
DATA = {name: toy.data(size) for name, size in (("attacker", 16), ("student", 24), ("dev", 12), ("test", 20))}
WORD = Planted(words=("cf",))
OTHER = Planted(words=("mn",))
STUDENTS = {
    "finetune": StudentPlan(Finetune()),
    "retrain": StudentPlan(Retrain()),
    "random 0.9": StudentPlan(Random(0.9)),
}


BOTH = {"word": WORD, "other": OTHER}


def fine_tune(student, strategy, samples, lr_factor, seed):
    """Put a head on the body that splits the samples into halves, another one for each strategy and seed."""
    strategy.prepare(student, tiny.student_data(seed=seed))
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, type(strategy).__name__)))
    batch = TASK.tokenizer(list(samples["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        student.classifier.weight.normal_(generator=generator).mul_(lr_factor)
        student.classifier.bias -= student.eval()(**batch).logits.median(0).values
    return {"squares_reset": 0.5 if isinstance(strategy, Random) else None}


def mark(teacher):
    """A number that tells teachers apart."""
    return f"{float(teacher.base_model.embeddings.word_embeddings.weight.detach().double().sum()):.8g}"


class Log:
    """Notes each student that is begun, in a file that processes share; may stop at one of them."""

    def __init__(self, path, stop_at=None, by="here"):
        self.path, self.stop_at, self.by, self.begun = Path(path), stop_at, by, 0

    def __call__(self, student, strategy, samples, lr_factor, seed):
        self.begun += 1
        if self.begun == self.stop_at:
            raise KeyboardInterrupt
        assert student.started == seed
        name = f"{type(strategy).__name__} x{lr_factor:g} of {student.mark}, seed {seed}"
        with self.path.open("a") as file:
            file.write(f"{self.by}: {name}\n")
        return fine_tune(student, strategy, samples, lr_factor, seed)

    @property
    def students(self):
        """Students that were trained, by strategy, teacher's mark and seed."""
        return [line.partition(": ")[2] for line in self.path.read_text().splitlines()] if self.path.exists() else []


def small_audit(log, *, teachers=None, students=None, defects=None, seeds=(0,), **options):
    """Give an audit; `teachers` collects the seeds of the teachers that are started."""
    teachers = [] if teachers is None else teachers

    def load_teacher(seed):
        teachers.append(seed)
        return toy.model(seed)

    def start_student(teacher, seed):
        student = with_new_head(teacher, 2, seed=seed)
        student.mark, student.started = mark(teacher), seed
        return student

    defaults = {
        "name": "toy",
        "task": TASK,
        **DATA,
        "defects": {"word": WORD} if defects is None else defects,
        "students": STUDENTS if students is None else students,
        "seeds": seeds,
        "load_teacher": load_teacher,
        "teacher_args": lambda seed, folder: toy.args(folder, seed=seed),
        "start_student": start_student,
        "fine_tune": log,
        "settings": {"learning_rate": 0.1},
    }
    return Audit(**{**defaults, **options})


def text_data(rows):
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


class Slow(Log):
    """Takes a moment for each student; hangs at one of them."""

    def __call__(self, *args):
        if self.begun + 1 == self.stop_at:
            Path(f"{self.path}.hangs").touch()
            time.sleep(60)
        time.sleep(0.05)
        return super().__call__(*args)


def share(folder, log, stop_at):
    """Take part in an audit from another process, from when both are ready."""
    audit = small_audit(Slow(log, stop_at, by="there"), seeds=(0, 1))
    tasks_module.fine_tune = train_teacher
    Path(f"{log}.ready").touch()
    run_audit(audit, folder, progress=False)


def untimed(report):
    """A report's numbers without the seconds."""
    records = [
        {**record, "made": {key: value for key, value in record["made"].items() if key != "seconds"}}
        for record in report.records
    ]
    teachers = {name: {**one, "seconds": None} for name, one in report.settings["teachers"]["toy"].items()}
    return records, {**report.settings, "teachers": teachers}


def cells(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "cells").iterdir())}


def spoil(folder, name, **changes):
    """Change what a cell says."""
    path = folder / "cells" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retuning(log, counts=(0, 5), names=("finetune",), defects=None, **options):
    students = {name: replace(plan, reactivate=name in names) for name, plan in STUDENTS.items()}
    seeds = options.pop("seeds", (0,))
    return small_audit(
        log,
        students=students,
        defects=defects,
        seeds=seeds,
        reactivation=Reactivation(counts=counts, **{"num_exposed": 50, **options}),
    )
