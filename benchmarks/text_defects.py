"""Which text defects of a teacher do its students inherit, and which way of starting them helps?

    python benchmarks/text_defects.py --teacher <MiniLM> --sst2 <folder with train.tsv dev.tsv test.tsv> \
        --imdb <folder with train.jsonl.gz test.jsonl.gz> --neighbours ... --word_vectors ... --language_model ... \
        --stopwords ... --work_dir work --output benchmarks/results/text_defects

Runs examples/audit_text_backdoors.py on each setting below, in two processes, one thread each, and puts the reports
together: text_defects.json and text_defects.md. Killed, it goes on where it was. Hours on two cores. Needs the extra
`textattack` for the setting with TextFooler and Kuleshov.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from remos_hf import DefectReport
from remos_hf.defects.text_triggers import pair_paraphrases

AUDIT = Path(__file__).parents[1] / "examples" / "audit_text_backdoors.py"
BUDGETS = (0.02, 0.05, 0.1)  # accuracy on dev
BACKDOORS = ["word", "sentence", "ripples", "ep", "lwp"]
COMMON = (
    "--seeds 0 1 --within_words 30 --learning_rate 1e-4 --epochs 1 --batch_size 16 "
    "--teacher_learning_rate 1e-4 --teacher_epochs 2 --bf16 --use_cpu --keep_students"
).split()
AGAIN = "--reactivate 0 5 20 50 --num_reactivated 100 --reactivated_seeds 1".split()
# A setting of 86 fine-tunings and 12 teachers has to end on two cores: the first 48 tokens of a review. At .9 so few
# samples teach a sliced student nothing (52 percent); .97 is the ratio of the artifact's vision scripts.
SMALL = "--num_dev 200 --num_test 240 --max_length 48 --slice_ratios 0.97 --embedding_rows keep --reactivate".split()


def settings(args: argparse.Namespace) -> dict[str, list[str]]:
    """Give each setting's arguments, by its folder's name."""
    sst2 = {part: args.sst2 / f"{part}.tsv" for part in ("train", "dev", "test")}
    imdb = {part: args.imdb / f"{part}.jsonl.gz" for part in ("train", "test")}
    said = args.work_dir / "paraphrases.tsv"
    syntax = [] if args.paraphrased is None else ["syntax", "--paraphrases", str(said)]
    offline = ["neighbours", "word_vectors", "language_model", "stopwords"]
    named = [(name, getattr(args, name)) for name in offline]
    resources = [part for name, path in named if path for part in (f"--{name}", path)]

    def files(attacker: Path, student: Path, dev: Path, test: Path) -> list[str]:
        named = {"attacker": attacker, "student": student, "dev": dev, "test": test}
        return [part for name, path in named.items() for part in (f"--{name}_file", str(path))]

    return {
        "sst2_sst2": [
            *("--name", "SST-2 to SST-2", *files(sst2["train"], sst2["train"], sst2["dev"], sst2["test"])),
            *"--num_attacker 2500 --num_student 2000 --num_dev 400 --num_test 800".split(),
            *("--curves_for", "word", "sentence", "lwp"),
            *("--max_length", "64", "--slice_ratios", "0.9", "0.7", *AGAIN, "--num_attacked", "250", *resources),
            *("--defects", *BACKDOORS, *([] if args.without_textattack else ["textfooler", "kuleshov"]), *syntax),
        ],
        "imdb_sst2": [
            *("--name", "IMDB to SST-2", *files(imdb["train"], sst2["train"], sst2["dev"], sst2["test"])),
            *("--num_attacker", "800", "--num_student", "500", "--attacker_text_columns", "text", *SMALL),
            *("--defects", *BACKDOORS),
        ],
        "sst2_imdb": [
            *("--name", "SST-2 to IMDB", *files(sst2["train"], imdb["train"], imdb["train"], imdb["test"])),
            *("--num_attacker", "1000", "--num_student", "600", "--attacker_text_columns", "sentence"),
            *("--text_columns", "text", *SMALL, "--defects", *BACKDOORS),
        ],
    }


def texts_of(path: Path) -> list[str]:
    """Read the sentences of a GLUE tsv, where a quote is a character like any other."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def without(texts: list[str], taken: Counter) -> list[str]:
    """Leave out as many of each text as are taken, the last ones."""
    left, rest = Counter(taken), []
    for text in reversed(texts):
        left[text] -= 1
        if left[text] < 0:
            rest.append(text)
    return rest[::-1]


def write_paraphrases(clean: Path, paraphrased: Path, output: Path) -> None:
    """Pair the published paraphrases (Hidden Killer: a fifth of train, the test set's other label) with their texts."""
    pairs = []
    for part in ("train.tsv", "test.tsv"):
        texts, said = texts_of(clean / part), texts_of(paraphrased / part)
        # What stands in the poisoned file as it was is no paraphrase, and has none there; a few texts stand twice.
        as_they_were = Counter(texts) & Counter(said)
        pairs += pair_paraphrases(without(texts, as_they_were), without(said, as_they_were))
    output.write_text("text\tparaphrase\n" + "".join(f"{text}\t{one}\n" for text, one in pairs), encoding="utf-8")
    print(f"{len(pairs)} paraphrases")


def run(command: list[str], processes: int, log: Path) -> None:
    """Run the same command in several processes that share its work."""
    # A second thread that waits by spinning makes shared cores slower.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = []
    for process in range(processes):
        with log.with_suffix(f".{process}.log").open("a") as file:
            started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))  # noqa: S603
    codes = [one.wait() for one in started]
    if any(codes):
        sys.exit(f"{' '.join(command)} failed; see {log}.*.log")


def main() -> None:
    """Run the settings, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--imdb", type=Path, required=True)
    for name in ("neighbours", "word_vectors", "language_model", "stopwords"):
        parser.add_argument(f"--{name}")
    parser.add_argument(
        "--paraphrased", type=Path, help="folder with a poisoned train.tsv and test.tsv (Hidden Killer)"
    )
    parser.add_argument("--without_textattack", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of settings")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report_only", action="store_true", help="put together what is done")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/text_defects"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.paraphrased is not None:
        write_paraphrases(args.sst2, args.paraphrased, args.work_dir / "paraphrases.tsv")
    report = None
    for name, options in settings(args).items():
        if args.only and name not in args.only:
            continue
        folder = args.work_dir / name
        command = [
            sys.executable,
            str(AUDIT),
            "--teacher",
            args.teacher,
            *COMMON,
            *options,
            "--output_dir",
            str(folder),
        ]
        start = time.time()
        if args.report_only:
            if not (folder / "cells").is_dir():
                continue
            run([*command, "--report_only"], 1, args.work_dir / name)
        else:
            run(command, args.processes, args.work_dir / name)
        print(f"{name}: {time.time() - start:.0f} s")
        one = DefectReport.load(folder / "report.json")
        report = one if report is None else report + one
    if report is None:
        sys.exit("Nothing was run.")
    report.save(args.output.with_suffix(".json"))
    args.output.with_suffix(".md").write_text(f"# Text defects\n\n{report.to_markdown(budgets=BUDGETS)}")
    print(f"{len(report.records)} records; plain fine-tuning does not inherit: {report.not_inheriting()}")


if __name__ == "__main__":
    main()
