"""Slicing a checkpoint on disk against in memory: peak resident set and seconds, on random weights in shards.

A BERT classifier of BERT-base's width is written in several shards, with random counts for its coverage. Then two
processes make the same student of it: one with `slice_checkpoint`, one with `from_pretrained`, `choose_slice`,
`squares_outside`, `reset_outside` and `save_pretrained`. Each way first runs in a process of its own on a tiny
checkpoint, so that code is not counted as weights. The peak is VmHWM of each process; the seconds are those of the
calls alone. That both students have the same tensors is checked.

    python benchmarks/slice_checkpoint.py --output benchmarks/results/slice_checkpoint.json     # a minute, 1.2 GB disk
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
import transformers

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.layers import weights_hash
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from remos_hf.slicing.refill import reset_outside, squares_outside
from remos_hf.slicing.relevant_slice import choose_slice

SAMPLES = 5000


def peak_bytes() -> int:
    """Largest resident set of this process so far. Linux keeps it anew for each program that is started."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (FileNotFoundError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_teacher(folder: Path, blocks: int, hidden: int, vocabulary: int, shard: str) -> dict:
    """Write a checkpoint of random weights in shards, and random counts for it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder, max_shard_size=shard)
    generator = torch.Generator().manual_seed(0)
    layers = adapter_for(model).layers()
    ends = [
        {
            name: torch.randint(0, SAMPLES + 1, (getattr(layer, end),), generator=generator)
            for name, layer in layers.items()
        }
        for end in ("in_neurons", "out_neurons")
    ]
    CoverageProfile(*ends, SAMPLES, teacher_hash=weights_hash(layers)).save(folder)
    parameters = list(model.parameters())
    return {
        "weights": sum(parameter.numel() for parameter in parameters),
        "sliced_weights": sum(layer.numel for layer in layers.values()),
        "model_bytes": sum(4 * parameter.numel() for parameter in parameters),
        "largest_tensor_bytes": max(4 * parameter.numel() for parameter in parameters),
        "largest_sliced_tensor_bytes": max(4 * layer.numel for layer in layers.values()),
        "shards": len(list(folder.glob("model*.safetensors"))),
    }


def slice_once(way: str, source: Path, target: Path, slice_ratio: float) -> None:
    """Make the student one of the two ways, and print the peak and the seconds as JSON."""
    profile, start = CoverageProfile.load(source), time.perf_counter()
    if way == "streamed":
        result = slice_checkpoint(source, target, slice_ratio=slice_ratio, profile=profile, progress=False)
        squares, steps = result.squares_reset, result.seconds
    else:
        model = transformers.BertForSequenceClassification.from_pretrained(source, dtype="auto")
        loaded = time.perf_counter()
        relevant = choose_slice(model, profile, slice_ratio=slice_ratio, progress=False)
        chosen = time.perf_counter()
        squares = squares_outside(model, relevant)
        reset_outside(model, relevant, verify_teacher=False)
        model.save_pretrained(target)
        steps = {"load": loaded - start, "choose": chosen - loaded, "reset": time.perf_counter() - chosen}
        relevant.save_pretrained(target)
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": seconds, "steps": steps, "squares_reset": squares}))


def measured(way: str, source: Path, target: Path, slice_ratio: float) -> dict:
    """Run `slice_once` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--source", source, "--target", target]
    command += ["--slice-ratio", str(slice_ratio)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def students_agree(one: Path, other: Path) -> bool:
    """Compare the weights and the slices of two folders, by the digests of their tensors."""
    return digests_in(one) == digests_in(other)


def digests_in(folder: Path) -> dict[str, str]:
    """Digest every tensor of a folder but those of the profile, one file at a time."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != COVERAGE_FILE:
            for name, tensor in safetensors.torch.load_file(path).items():
                found[f"{path.name[:5]}/{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return found


def main(args: argparse.Namespace) -> None:
    """Write teachers, slice them in processes of their own, compare."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        write_teacher(folder / "tiny", 1, 64, 100, "100MB")
        facts = write_teacher(folder / "teacher", args.blocks, args.hidden, args.vocabulary, args.shard)
        found, base = {}, {}
        for way in ("streamed", "held"):
            base[way] = measured(way, folder / "tiny", folder / f"tiny_{way}", args.slice_ratio)["peak_bytes"]
            found[way] = measured(way, folder / "teacher", folder / way, args.slice_ratio)
            found[way]["extra_bytes"] = found[way]["peak_bytes"] - base[way]
            found[way]["base_bytes"] = base[way]
        same = students_agree(folder / "streamed", folder / "held")
    result = {
        "model": f"BertForSequenceClassification, {args.blocks} blocks, hidden {args.hidden}, fp32, random weights",
        **facts,
        "rule": "remos",
        "slice_ratio": args.slice_ratio,
        **found,
        "extra_bytes_ratio": found["streamed"]["extra_bytes"] / found["held"]["extra_bytes"],
        "seconds_ratio": found["streamed"]["seconds"] / found["held"]["seconds"],
        "students_identical": same,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--scratch", type=Path, help="where the checkpoints are written; a temporary folder if not given"
    )
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--shard", default="100MB")
    parser.add_argument("--slice-ratio", type=float, default=0.9)
    parser.add_argument("--way", choices=["streamed", "held"], help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        slice_once(given.way, given.source, given.target, given.slice_ratio)
    else:
        if given.output is None:
            parser.error("--output is needed")
        main(given)
