"""How much memory choosing a slice takes beyond the model: the peak resident set, over 100M fp32 weights.

Layers have BERT-base's shapes, 14 blocks of them; counts are random. The peak before choosing is the model's own,
because weights are drawn in place; `choose_slice` is the public call, hashing included.

    python benchmarks/choose_memory.py --output benchmarks/results/choose_memory.json     # 20 seconds, 0.6 GB
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import nn

from remos_hf.layers import sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.relevant_slice import choose_slice

SAMPLES = 5000
BLOCK = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_profile(model: nn.Module) -> CoverageProfile:
    """Draw counts for both ends of every layer."""
    generator = torch.Generator().manual_seed(0)
    layers = sliceable_layers(model)
    ends = [
        {
            name: torch.randint(0, SAMPLES + 1, (getattr(layer, end),), generator=generator)
            for name, layer in layers.items()
        }
        for end in ("in_neurons", "out_neurons")
    ]
    return CoverageProfile(*ends, SAMPLES)


def main(args: argparse.Namespace) -> None:
    """Build, choose on a small model to load all code, choose on the large one, compare peaks."""
    small = nn.Sequential(nn.Linear(600, 600))
    choose_slice(small, random_profile(small), slice_ratio=0.9, progress=False)
    model = nn.Sequential(*[nn.Linear(i, o, bias=False) for _ in range(args.blocks) for i, o in BLOCK])
    profile = random_profile(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    before, start = peak_bytes(), time.perf_counter()
    choose_slice(model, profile, slice_ratio=args.slice_ratio, rule=args.rule, progress=False)
    elapsed, extra = time.perf_counter() - start, peak_bytes() - before
    result = {
        "rule": args.rule,
        "slice_ratio": args.slice_ratio,
        "weights": weights,
        "model_bytes": 4 * weights,
        "extra_bytes": extra,
        "share_of_model": extra / (4 * weights),
        "seconds": elapsed,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--rule", default="remos", choices=["remos", "top_magnitude", "mag_prune", "random"])
    parser.add_argument("--slice-ratio", type=float, default=0.9)
    main(parser.parse_args())
