"""What a training step costs with a hold, over a plain step: an encoder on real text, and ResNets.

A step is the loss, its backward pass, the optimizer's update and what the hold does after it. All kinds take turns on
the same batches, so that a machine that slows down slows all. Counted are the CPU seconds of this process, on one
thread: what else runs on the machine does not count. Bytes are the most that training holds at one time. Neither
depends on values, so the images are random.

    python benchmarks/hold_cost.py --teacher sentence-transformers/all-MiniLM-L6-v2 --data train.tsv \
        --output benchmarks/results/hold_cost.json
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.renofeation import Renofeation
from remos_hf.strategies.student_data import StudentData

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from audit_image_defects import CifarResNet  # noqa: E402 - the CIFAR net of the example

HOLDS: dict[str, Strategy | Sequence[Strategy]] = {
    "Distilled": Distilled(),
    "Hardened": Hardened(),
    "Guided": Guided(),
    "Hardened + Distilled": [Hardened(), Distilled()],
    "L2SP": L2SP(),
    "Delta": Delta(attention="gradient_x_activation", samples=16, head_steps=0),
    "FeatureLwF": FeatureLwF(head_steps=0),
    "Renofeation": Renofeation(average_decay=None, average_every=500),
    "Renofeation, averaging every step": Renofeation(),
    "Renofeation with a projector": Renofeation(average_decay=None, average_every=500, projector=True),
}


def texts(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Load the encoder, and tokenise the first sentences of a tsv with a header, padded batch by batch."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32)
    lines = args.data.read_text(encoding="utf-8").splitlines()[1 : args.repeats * args.batch_size + 1]
    batches = []
    for start in range(0, len(lines), args.batch_size):
        rows = [line.split("\t")[0] for line in lines[start : start + args.batch_size]]
        batch = dict(tokenizer(rows, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        batches.append({**batch, "labels": torch.zeros(len(rows), dtype=torch.long)})
    return model, batches


def images(args: argparse.Namespace, pixels: int) -> list[dict]:
    """Draw random images."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, pixels, pixels)
    labels = torch.zeros(args.batch_size, dtype=torch.long)
    return [{"pixel_values": torch.randn(shape, generator=generator), "labels": labels} for _ in range(args.repeats)]


def timm_images(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Build a model of timm, and random images for it."""
    return image_classifier(args.timm, pretrained=False, num_labels=10), images(args, args.pixels)


def cifar_images(args: argparse.Namespace) -> tuple[nn.Module, list[dict]]:
    """Build the ResNet-20 of CIFAR, and random images of 32 pixels for it."""
    return ImageClassifier(CifarResNet(3), head=("linear",)), images(args, 32)


@dataclass
class Cost:
    """What steps of one kind cost.

    Attributes:
        seconds: CPU seconds of each step; the first batch warmed up.
        start: CPU seconds of what is done once, before the first step.
        bytes: Parameters and buffers of the student and of a teacher that is kept, the optimizer's state, and the most
            that a step allocates beside them.
    """

    seconds: list[float]
    start: float = 0.0
    bytes: int = 0


def costs_of(
    model: nn.Module, batches: list[dict], kinds: Mapping[str, Strategy | Sequence[Strategy]], *, start: bool = False
) -> dict[str, Cost]:
    """Give the cost of a step of each kind, and of "plain".

    Args:
        model: Student and teacher are copies of it.
        batches: Each is taken by every kind in turn.
        kinds: Strategies by name.
        start: Start the student by the strategy first; else its weights stay the teacher's.
    """
    recipes = {"plain": Strategy(), **{name: as_strategy(parts).with_seed(0) for name, parts in kinds.items()}}
    data = StudentData(lambda _: batches, num_samples=len(batches) * len(batches[0]["labels"]))
    students, costs = {}, {}
    for name, strategy in recipes.items():
        student = copy.deepcopy(model).train()
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        begun = time.process_time()
        if start:
            strategy.prepare(student, data)
        hold = (strategy.hold(student, teacher) if strategy.holds else None) or Hold()
        hold.begin(student, data)
        costs[name] = Cost([], time.process_time() - begun)
        trained = [one for one in student.parameters() if one.requires_grad]
        students[name] = Student(
            student, hold, torch.optim.AdamW(trained, 1e-5), teacher if hold.needs_teacher else None
        )
    for batch in batches:
        for name, student in students.items():
            begun = time.process_time()
            student.step(batch)
            costs[name].seconds.append(time.process_time() - begun)
    for name, student in students.items():
        costs[name].seconds.pop(0)
        costs[name].bytes = student.held_bytes() + peak_bytes(lambda student=student: student.step(batches[0]))
    return costs


@dataclass
class Student:
    """A student in training."""

    model: nn.Module
    hold: Hold
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None

    def step(self, batch: dict) -> None:
        """Take one."""
        loss, _ = self.hold.loss(self.model, batch, lambda given: (self.model(**given)["loss"], None))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hold.after_step(self.model)

    def held_bytes(self) -> int:
        """Count what is held between steps, each tensor once."""
        found = [*self.model.parameters(), *self.model.buffers()]
        if self.teacher is not None:
            found += [*self.teacher.parameters(), *self.teacher.buffers()]
        found += [one for state in self.optimizer.state.values() for one in state.values() if torch.is_tensor(one)]
        return sum(one.nbytes for one in {one.data_ptr(): one for one in found}.values())


def ratios_of(costs: Mapping[str, Cost]) -> dict[str, list[float]]:
    """Give each step's seconds over those of the plain step on the same batch, by kind."""
    plain = costs["plain"].seconds
    return {kind: [one / base for one, base in zip(found.seconds, plain, strict=True)] for kind, found in costs.items()}


def peak_bytes(run: Callable[[], None]) -> int:
    """Give the most bytes that a call has allocated at one time, on the CPU, beside those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate((one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())), initial=0))


def main(args: argparse.Namespace) -> None:
    """Print and write the median ratio of each kind to the plain step on the same batch."""
    torch.set_num_threads(1)
    results = {}
    for name, load in ((args.name, texts), (args.timm, timm_images), ("resnet20", cifar_images)):
        costs = costs_of(*load(args), HOLDS)
        plain = costs["plain"]
        ratios = ratios_of(costs)
        results[name] = {
            "plain_seconds": statistics.median(plain.seconds),
            "plain_bytes": plain.bytes,
            "bytes_ratio": {kind: round(one.bytes / plain.bytes, 3) for kind, one in costs.items() if kind != "plain"},
            "ratio": {kind: round(statistics.median(found), 3) for kind, found in ratios.items() if kind != "plain"},
            "ratios": {kind: [round(one, 3) for one in sorted(found)] for kind, found in ratios.items()},
        }
    facts = {"batch_size": args.batch_size, "pixels": args.pixels, "steps": args.repeats - 1, "threads": 1}
    made = {**facts, "seconds": "CPU seconds of the process", "models": results}
    print(json.dumps(made, indent=2))
    args.output.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id of an encoder")
    parser.add_argument("--data", type=Path, required=True, help="tsv with a header; the first column is the text")
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="what to call the encoder in the result")
    parser.add_argument("--timm", default="resnet18", help="a model of timm")
    parser.add_argument("--pixels", type=int, default=64, help="side of its images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10, help="batches, of which the first warms up")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
