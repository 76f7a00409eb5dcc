"""Defect reports made of counts."""

from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.judging.report import DefectReport
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos

HOW = {
    "finetune": (Finetune(), 1.0),
    "finetune lr x3": (Finetune(), 3.0),
    "random 0.9": (Random(0.9), 1.0),
    "random 0.97": (Random(0.97), 1.0),
    "remos 0.9": (Remos(0.9), 1.0),
}


def cell(student, acc, dir_, floor=(0, 100), *, defect="word", task="SST-2", seed=0):
    """A record: counts of (those that did it, all)."""
    own, low = Rate.of(*dir_), None if floor is None else Rate.of(*floor)
    strategy, factor = HOW.get(student, (None, 1.0))
    made = {} if strategy is None else {"strategy": strategy.to_dict(), "lr_factor": factor}
    if isinstance(strategy, Random):
        made["rule"] = "random"
    return {
        "task": task,
        "defect": defect,
        "student": student,
        "seed": seed,
        "acc": Rate.of(*acc).to_dict(),
        "dir": own.to_dict(),
        "floor": low and low.to_dict(),
        "excess": low and excess_dir(own, low).to_dict(),
        "made": made,
    }


def report(cells=None, **settings):
    """Plain fine-tuning inherits all, ReMoS a little, a random reset as much as `random` says."""
    cells = usual() if cells is None else cells
    return DefectReport(cells, {"reference": "finetune", **settings})


def usual(random=(60, 100), faster=(70, 100), **where):
    return [
        cell("finetune", (90, 100), (97, 100), **where),
        cell("finetune lr x3", (88, 100), faster, **where),
        cell("random 0.9", (87, 100), random, **where),
        cell("remos 0.9", (86, 100), (5, 100), (2, 100), **where),
    ]
