"""What students of every transfer strategy inherit, at which accuracy, time and memory: figure 5 of ReMoS, and more.

    python benchmarks/strategies.py --cifar <folder with train/ and test/> --cifar_resnet resnet20.th \
        --patch firefox.png --work_dir work

Strategies are set as published, with what they do by their steps in proportion to a shorter run; all train with one
optimizer, at 1e-2 or, named x3 and x10, at so many times that. Beside them stand random resets and the starts of
image_starts.py. Writes benchmarks/results/strategies_<setting>.{json,md}: defects beside their floors, and what a step
costs in time and memory. Killed, it goes on where it was; the same command in a second process shares the work.
"""

import argparse
import statistics

import torch
from hold_cost import costs_of, ratios_of
from image_starts import Setting, add_data, audit_of, made_and_written

from remos_hf import Audit, DefectReport, StudentPlan
from remos_hf.strategies import (
    L2SP,
    STRATEGIES,
    DeltaR,
    Finetune,
    MagPrune,
    Neft,
    Random,
    RelativeUpdate,
    Remos,
    Retrain,
)
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.presets import PRESETS

DEFECTS = ("patch", "penultimate")
SETTINGS = {
    "cifar": Setting(5000, 500, (0, 1, 2), DEFECTS, "5,000 images, 500 steps"),
    "flowers": Setting(
        *(300, 57, (0, 1, 2), DEFECTS, "photos of flowers, 300 of them, 57 steps"), teacher_steps=120, flowers=True
    ),
}


def strategies(steps: int) -> dict[str, tuple[Strategy | list[Strategy], float]]:
    """Give every strategy by name, with what its learning rate is multiplied by: ten for what starts at random.

    Args:
        steps: Of a run, to which the published numbers of steps are put in proportion.
    """
    published = {
        name: PRESETS[preset][source].within(steps).strategy
        for name, preset, source in (
            ("delta", "delta", "paper"),
            ("delta, mean", "delta", "artifact"),
            ("feature_lwf", "feature_lwf", "artifact"),
            ("renofeation", "renofeation", "artifact"),
        )
    }
    subspace, hardened = STRATEGIES["subspace"], STRATEGIES["hardened"]
    return {
        "finetune": (Finetune(), 1.0),
        "retrain x10": (Retrain(), 10.0),
        "mag_prune 0.2": (MagPrune(0.2), 1.0),
        "delta": (published["delta"], 1.0),
        "delta, mean": (published["delta, mean"], 1.0),
        "l2sp": (L2SP(), 1.0),
        "feature_lwf": (published["feature_lwf"], 1.0),
        "delta_r x10": (DeltaR(), 10.0),
        "renofeation x10": (published["renofeation"], 10.0),
        "neft 4": (Neft(k=4), 1.0),
        "remos 0.95": (Remos(slice_ratio=0.95), 1.0),
        "relative_update 0.9": (RelativeUpdate(slice_ratio=0.9), 1.0),
        "random 0.7": (Random(slice_ratio=0.7), 1.0),
        "subspace 0.95": (subspace(energy=0.95), 1.0),
        "subspace 0.95 + hardened x3": ([subspace(energy=0.95), hardened()], 3.0),
    }


def audit(args: argparse.Namespace) -> Audit:
    """Put the audit of a setting together."""
    setting = SETTINGS[args.setting]
    made = strategies(setting.steps)
    return audit_of(
        args, setting, {name: StudentPlan(as_strategy(one), factor) for name, (one, factor) in made.items()}
    )


def costs(args: argparse.Namespace, report: DefectReport) -> str:
    """Measure what a step of each student costs, and say it below the table; the record gets it too."""
    torch.set_num_threads(1)
    setting = SETTINGS[args.setting]
    made, images = audit(args), torch.Generator().manual_seed(0)
    model, size = made.load_teacher(0), made.task.images.size
    shape = (32, 3, *((size, size) if isinstance(size, int) else size))
    batches = [
        {"pixel_values": torch.randn(shape, generator=images), "labels": torch.arange(32) % 10} for _ in range(10)
    ]
    names = sorted({record["student"] for record in report.records} - {"teacher"}, key=list(strategies(1000)).index)
    kinds = {name: strategies(setting.steps)[name][0] for name in names}
    found = costs_of(model, batches, kinds, start=True)
    ratios, plain = ratios_of(found), found["plain"]
    lines = ["", "## What a step costs", "", "| strategy | time | memory | start and training |", "|---|---|---|---|"]
    whole = {
        name: [sum(one["made"]["seconds"].values()) for one in report.records if one["student"] == name]
        for name in names
    }
    for name in names:
        time, memory = statistics.median(ratios[name]), found[name].bytes / plain.bytes
        total = statistics.median(whole[name]) / statistics.median(whole["finetune"])
        report.settings.setdefault("costs", {})[name] = {"time": time, "memory": memory, "whole": total}
        lines.append(f"| {name} | {time:.2f} | {memory:.2f} | {total:.2f} |")
    told = (
        "Over plain fine-tuning's. Time: CPU seconds of a step, one thread, median of 9 on random images in batches of "
        f"32. Memory: the most held at one time, of which plain fine-tuning holds {plain.bytes / 2**20:.0f} MiB. Start "
        "and training: seconds on the clock, beside other work, medians."
    )
    return "\n".join([*lines, "", told, ""])


def main() -> None:
    """Run a setting, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    made_and_written(parser, SETTINGS, audit, "strategies", costs)


if __name__ == "__main__":
    main()
