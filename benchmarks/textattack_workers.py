"""How much faster are two workers than one at searching adversarial texts?

    python benchmarks/textattack_workers.py --teacher <fine-tuned classifier> --data test.tsv --neighbours ... \
        --word_vectors ... --language_model ... --stopwords ... --output benchmarks/results/textattack_workers.json

Each run attacks the same sentences with nothing cached, in turn with one worker and with two. The exposed texts must be
the same. Starting a worker imports TextAttack, which takes seconds: it is part of the time. What the machine itself
allows is measured beside it: two processes that know nothing of each other, each searching all sentences with one
worker; two virtual cores may be one real one. Needs the extra `textattack`, and an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remos_hf import AdversarialText
from remos_hf.auditing.data_files import read_table


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, required=True, help="tsv with the columns sentence and label")
    for name in ("neighbours", "word_vectors", "language_model", "stopwords"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--recipe", default="kuleshov")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--once", action="store_true", help="print the seconds of one search by one worker, and stop")
    args = parser.parse_args()
    data = read_table(args.data, ["sentence"])
    # Both labels, though the file is sorted by them.
    data = data.select(range(0, len(data), max(1, len(data) // args.samples))[: args.samples])
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    files = {name: getattr(args, name) for name in ("neighbours", "word_vectors", "language_model", "stopwords")}
    defect = AdversarialText(args.recipe, max_length=args.max_length, **files)
    if args.once:
        start = time.perf_counter()
        defect.exposed_set(data, teacher=teacher, tokenizer=tokenizer)
        print(time.perf_counter() - start)
        return
    seconds: dict[int, list[float]] = {1: [], 2: []}
    texts, facts, beside = [], {}, []
    for _ in range(args.repeats):
        beside.append(round(both_at_once(), 2))
        for workers, times in seconds.items():
            start = time.perf_counter()
            exposed = defect.exposed_set(data, teacher=teacher, tokenizer=tokenizer, workers=workers)
            times.append(round(time.perf_counter() - start, 2))
            texts.append(list(exposed.dataset["text"]))
            facts = dict(exposed.facts)
    result = {
        "recipe": args.recipe,
        "num_samples": len(data),
        "num_fooled": len(texts[0]),
        "same_texts": all(one == texts[0] for one in texts),
        "seconds": seconds,
        "ratio_of_medians": round(statistics.median(seconds[1]) / statistics.median(seconds[2]), 3),
        "seconds_of_two_separate_searches": beside,
        "ratio_that_the_machine_allows": round(2 * statistics.median(seconds[1]) / statistics.median(beside), 3),
        "versions": facts["versions"],
        "mean_queries": facts["mean_queries"],
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def both_at_once() -> float:
    """Search all sentences in two separate processes at the same time; give the seconds of the slower one."""
    command = [sys.executable, *sys.argv, "--once"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = [subprocess.Popen(command, env=os.environ, **pipes) for _ in range(2)]  # noqa: S603
    return max(float(one.communicate()[0].split()[-1]) for one in started)


if __name__ == "__main__":
    main()
