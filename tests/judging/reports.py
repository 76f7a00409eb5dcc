"""Reports made of counts, several seeds a student."""

import numpy as np

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.evaluation.outcomes import Outcomes
from remos_hf.judging.report import DefectReport
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos

SAMPLES = 200
STRATEGIES = {
    "finetune": (Finetune(), 1.0),
    "finetune lr x3": (Finetune(), 3.0),
    "retrain": (Retrain(), 1.0),
    "random 0.9": (Random(0.9), 1.0),
    "random 0.7": (Random(0.7), 1.0),
    "remos 0.9": (Remos(0.9), 1.0),
    "remos 0.7": (Remos(0.7), 1.0),
    "mag_prune 0.9": (MagPrune(0.9), 1.0),
}


def made_of(student):
    """The record of how a student of this name is made; empty for other names."""
    if student not in STRATEGIES:
        return {}
    strategy, factor = STRATEGIES[student]
    made = {"strategy": strategy.to_dict(), "lr_factor": factor}
    ratio = getattr(strategy, "slice_ratio", None)
    return made if ratio is None else {**made, "rule": student.split()[0], "slice_ratio": ratio}


def outcomes_of(count, of=SAMPLES):
    """All samples right when clean; the first so many fail: students then fail on the same ones."""
    return Outcomes(np.ones(of, dtype=bool), np.arange(of) < count).to_dict()


def records(student, dirs, *, acc=(170, 170, 170), floors=(4, 4, 4), dev=None, of=SAMPLES, flip=True, **options):
    """One record a seed: counts of `of` samples."""
    found = []
    for seed, (count, right) in enumerate(zip(dirs, acc, strict=True)):
        own, twin = Rate.of(count, of), None if floors is None else Rate.of(floors[seed], of)
        found.append(
            {
                "task": "SST-2",
                "defect": "word",
                "student": student,
                "seed": seed,
                "acc": Rate.of(right, 200).to_dict(),
                "dev_acc": Rate.of(right if dev is None else dev, 200).to_dict(),
                "dir": own.to_dict(),
                "flip": own.to_dict() if flip else None,
                "floor": twin and twin.to_dict(),
                "excess": twin and excess_dir(own, twin).to_dict(),
                "commonest": 0.5,
                "outcomes": outcomes_of(count, of),
                "floor_outcomes": twin and outcomes_of(floors[seed], of),
                "made": made_of(student),
                **options,
            }
        )
    return found


def teachers(dirs=(198, 198, 198), *, acc=(172, 172, 172), clean=(172, 172, 172), of=SAMPLES):
    """What an audit measured of its poisoned teachers and of the clean one."""
    held = {}
    for seed, (count, right, before) in enumerate(zip(dirs, acc, clean, strict=True)):
        rate = Rate.of(count, of).to_dict()
        held[f"word-{seed}"] = {"acc": Rate.of(right, 200).to_dict(), "dir": {"word": rate}, "flip": {"word": rate}}
        held[f"clean-{seed}"] = {"acc": Rate.of(before, 200).to_dict(), "dir": {}, "flip": {}}
    return held


def report(*several, taught=None, **settings):
    """Put records into a report whose teachers obey."""
    held = {"reference": "finetune", "teachers": {"SST-2": teachers() if taught is None else taught}, **settings}
    return DefectReport([record for of in several for record in of], held)


PLAIN = records("finetune", (196, 198, 194))
REMOS = records("remos 0.9", (10, 14, 8), acc=(168, 169, 167), floors=(8, 8, 8))
RANDOM = records("random 0.9", (120, 140, 110), acc=(168, 168, 168))
FASTER = records("finetune lr x3", (90, 60, 80), acc=(169, 169, 168))
USUAL = (PLAIN, REMOS, RANDOM, FASTER)
