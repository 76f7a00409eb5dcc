"""What `import remos_hf` costs beyond `import torch`, each in a new process.

python benchmarks/import_time.py --output benchmarks/results/import_time.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STATEMENTS = {
    "torch": "import torch",
    "torch, remos_hf": "import torch, remos_hf",
    "torch, transformers.Trainer": "import torch; from transformers import Trainer",
    "torch, remos_hf.RemosTrainer": "import torch; from remos_hf import RemosTrainer",
}


def seconds(statement: str) -> float:
    """Wall-clock time of a new interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    """Run every statement in turn, print and write medians."""
    rounds = [{name: seconds(code) for name, code in STATEMENTS.items()} for _ in range(args.repeats + 1)][1:]
    median = {name: statistics.median(times[name] for times in rounds) for name in STATEMENTS}
    beyond = statistics.median(times["torch, remos_hf"] - times["torch"] for times in rounds)
    result = {"repeats": args.repeats, "median_seconds": median, "remos_hf_beyond_torch_seconds": beyond}
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    main(parser.parse_args())
