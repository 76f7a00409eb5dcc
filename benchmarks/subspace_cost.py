"""What a subspace start costs beside the fine-tuning that follows it: three epochs, on texts and on images.

Steps of fine-tuning are timed before and after the start in the same process, so that a machine that slows down slows
both. `cpu` is the time that all threads of this process computed, which other processes on the machine leave alone.

    python benchmarks/subspace_cost.py --teacher sentence-transformers/all-MiniLM-L6-v2 --data train.tsv \
        --output benchmarks/results/subspace_cost.json
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.strategies.student_data import StudentData
from remos_hf.strategies.subspace import Subspace

EPOCHS, TRAIN_BATCH, READ_BATCH = 3, 16, 32


def texts(args: argparse.Namespace) -> tuple[nn.Module, Callable[[int, int | None], list[dict]]]:
    """Load the teacher; give its batches of the first sentences of a tsv with a header, by size and number."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32)
    rows = [line.split("\t") for line in args.data.read_text(encoding="utf-8").splitlines()[1 : args.samples + 1]]

    def batches(size: int, count: int | None) -> list[dict]:
        some = rows[: count or len(rows)]
        parts = [some[start : start + size] for start in range(0, len(some), size)]
        return [
            dict(
                tokenizer([row[0] for row in part], padding=True, truncation=True, max_length=128, return_tensors="pt")
            )
            | {"labels": torch.tensor([int(row[1]) for row in part])}
            for part in parts
        ]

    return model, batches


def images(args: argparse.Namespace, pixels: int) -> tuple[nn.Module, Callable[[int, int | None], list[dict]]]:
    """Give timm's ResNet-18 with random weights and random images: time depends on neither."""
    torch.manual_seed(0)
    shown = torch.randn(args.samples, 3, pixels, pixels)

    def batches(size: int, count: int | None) -> list[dict]:
        parts = shown[: count or len(shown)].split(size)
        return [{"pixel_values": part, "labels": torch.zeros(len(part), dtype=torch.int64)} for part in parts]

    return image_classifier("resnet18", pretrained=False, num_labels=10), batches


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Time one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def trained(model: nn.Module, batches: list[dict]) -> None:
    """Take a step of AdamW on every batch."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-5)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(model: nn.Module, batches: Callable, args: argparse.Namespace) -> dict[str, object]:
    """Time the start, and steps of fine-tuning around it."""
    every = batches(TRAIN_BATCH, None)
    some = every[:: max(1, len(every) // args.steps)]
    trained(copy.deepcopy(model), some[:2])
    before = timed(lambda: trained(copy.deepcopy(model), some))
    student = copy.deepcopy(model)
    data = StudentData(lambda count: batches(READ_BATCH, count))
    found: dict[str, object] = {}
    start = timed(
        lambda: found.update(start=Subspace(args.energy, max_samples=args.max_samples).prepare(student, data))
    )
    after = timed(lambda: trained(student, some))
    steps = EPOCHS * len(every) / len(some)
    fine_tuning = {key: steps * (before[key] + after[key]) / 2 for key in before}
    told = found["start"].details["subspace"]
    return {
        "samples": args.samples,
        "start_samples": told["samples"],
        "distinct_layers": len(told["layers"]),
        "largest_width": max(one["columns"] for one in told["layers"].values()),
        "start": start,
        "start_steps": found["start"].seconds,
        "steps_timed": 2 * len(some),
        "steps_of_fine_tuning": EPOCHS * len(every),
        "fine_tuning": fine_tuning,
        "ratio": {key.removesuffix("_seconds"): start[key] / fine_tuning[key] for key in start},
    }


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id of an encoder")
    parser.add_argument("--data", type=Path, required=True, help="tsv with a header: sentence, label")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the student's task")
    parser.add_argument("--max-samples", type=int, default=512, help="samples that the start reads")
    parser.add_argument("--energy", type=float, default=0.97)
    parser.add_argument("--steps", type=int, default=40, help="steps of fine-tuning timed before and after")
    parser.add_argument("--only", choices=["minilm", "resnet18_32px", "resnet18_64px"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    cases = {
        "minilm": lambda: texts(args),
        "resnet18_32px": lambda: images(args, 32),
        "resnet18_64px": lambda: images(args, 64),
    }
    found = {name: measured(*make(), args) for name, make in cases.items() if args.only in (None, name)}
    report = {"threads": torch.get_num_threads(), "energy": args.energy, "torch": torch.__version__, "cases": found}
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
