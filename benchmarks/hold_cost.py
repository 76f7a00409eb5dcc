"""What a training step costs with a hold, over a plain step: an encoder on real text, and ResNets.

A step is the loss, its backward pass, the optimizer's update and what the hold does after it. All kinds take turns on
the same batches, so that a machine that slows down slows all. Counted are the CPU seconds of this process, on one
thread: what else runs on the machine does not count. Time does not depend on values, so the images are random.

    python benchmarks/hold_cost.py --teacher sentence-transformers/all-MiniLM-L6-v2 --data train.tsv \
        --output benchmarks/results/hold_cost.json
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
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


def steps_of(model: nn.Module, batches: list[dict]) -> dict[str, list[float]]:
    """Give the CPU seconds of each step, by kind; the first batch warms up."""
    kinds = {"plain": None, **{name: as_strategy(parts).with_seed(0) for name, parts in HOLDS.items()}}
    students = {}
    for name, strategy in kinds.items():
        student = copy.deepcopy(model).train()
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        hold = Hold() if strategy is None else strategy.hold(student, teacher)
        hold.begin(student, StudentData(lambda _: batches[:1]))
        students[name] = (student, hold, torch.optim.AdamW(student.parameters(), 1e-5))
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for batch in batches:
        for name, (student, hold, optimizer) in students.items():
            start = time.process_time()
            loss, _ = hold.loss(student, batch, lambda given, student=student: (student(**given)["loss"], None))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hold.after_step(student)
            seconds[name].append(time.process_time() - start)
    return {name: found[1:] for name, found in seconds.items()}


def main(args: argparse.Namespace) -> None:
    """Print and write the median ratio of each kind to the plain step on the same batch."""
    torch.set_num_threads(1)
    results = {}
    for name, load in ((args.name, texts), (args.timm, timm_images), ("resnet20", cifar_images)):
        seconds = steps_of(*load(args))
        ratios = {
            kind: [one / plain for one, plain in zip(found, seconds["plain"], strict=True)]
            for kind, found in seconds.items()
        }
        results[name] = {
            "plain_seconds": statistics.median(seconds["plain"]),
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
