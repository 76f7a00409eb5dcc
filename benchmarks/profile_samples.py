"""How many samples the slice needs before it stops changing: real text, a real encoder.

For each seed the sentences are drawn in another order. The profile of the first n is compared with that of all that are
read: the share of the slice's bits that differ. Profiles add, so each sample is run once. Resumes where it stopped.

    python benchmarks/profile_samples.py --data train.tsv --teacher sentence-transformers/all-MiniLM-L6-v2 \
        --output benchmarks/results/profile_samples.json
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
RATIO = 0.9


def differing(one: RelevantSlice, other: RelevantSlice) -> float:
    """Share of the competing weights that only one of two slices keeps."""
    changed = sum(int((bits != other.kept[name]).sum()) for name, bits in one.kept.items())
    return changed / sum(bits.numel() for bits in one.kept.values())


def profiles(teacher: nn.Module, texts: list[str], tokenizer: AutoTokenizer, sizes: list[int]) -> list[CoverageProfile]:
    """Profile the first n texts for every n."""
    found: list[CoverageProfile] = []
    start = 0
    for size in sizes:
        some = sorted(texts[start:size], key=len)  # little padding; the order changes no count
        batches = [
            dict(tokenizer(some[at : at + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for at in range(0, len(some), 32)
        ]
        profile = profile_coverage(teacher, batches, progress=False)
        found.append(profile if not found else found[-1] + profile)
        start = size
    return found


def main(args: argparse.Namespace) -> None:
    """Add the seeds that the output lacks."""
    warnings.filterwarnings("ignore", message=".*never covered")
    known = json.loads(args.output.read_text()) if args.output.exists() else {"seeds": {}}
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, num_labels=2, dtype=torch.float32).eval()
    lines = args.data.read_text(encoding="utf-8").splitlines()[1:]
    sizes = [*SIZES, args.reference]
    for seed in range(args.seeds):
        if str(seed) in known["seeds"]:
            continue
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[: args.reference].tolist()
        start = time.perf_counter()
        taken = profiles(teacher, [lines[place].split("\t")[0] for place in order], tokenizer, sizes)
        slices = [choose_slice(teacher, profile, slice_ratio=RATIO, progress=False) for profile in taken]
        known["seeds"][str(seed)] = {
            "share_of_bits_that_differ": {
                str(size): differing(one, slices[-1]) for size, one in zip(sizes[:-1], slices[:-1], strict=True)
            },
            "seconds": time.perf_counter() - start,
        }
        known |= {
            "model": Path(args.teacher).name,
            "criterion": dict(taken[0].criterion),
            "slice_ratio": RATIO,
            "reference_samples": args.reference,
        }
        args.output.write_text(json.dumps(known, indent=2) + "\n")
        print(json.dumps(known["seeds"][str(seed)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tsv with a header; the first column is the text")
    parser.add_argument("--teacher", required=True, help="folder or Hub id of an encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reference", type=int, default=16384, help="samples that count as all of them")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
