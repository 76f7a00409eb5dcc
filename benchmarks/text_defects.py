"""Which text defects of a teacher do its students inherit, and which way of starting them helps?

    python benchmarks/text_defects.py --teacher <MiniLM> --sst2 <folder with train.tsv dev.tsv test.tsv> \
        --imdb <folder with train.jsonl.gz test.jsonl.gz> --neighbours ... --word_vectors ... --language_model ... \
        --stopwords ... --work_dir work --output benchmarks/results/text_defects

Runs examples/audit_text_backdoors.py on each setting below, in two processes, one thread each, and puts the reports
together: text_defects.json and text_defects.md. Killed, it goes on where it was. Hours on two cores. Needs the extra
`textattack` for the setting with TextFooler and Kuleshov.
"""

import argparse
from collections import Counter
from pathlib import Path

from audit_runs import add_arguments, run_settings, write

from remos_hf.adapters.tables import read_rows
from remos_hf.defects.paraphrases import pair_paraphrases

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

    found = {
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
    return {name: ["--teacher", args.teacher, *COMMON, *options] for name, options in found.items()}


def texts_of(path: Path) -> list[str]:
    """Read the sentences of a GLUE tsv, where a quote is a character like any other."""
    return read_rows(path)["sentence"][:]


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


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add teachers, data, and what defects need."""
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--imdb", type=Path, required=True)
    for name in ("neighbours", "word_vectors", "language_model", "stopwords"):
        parser.add_argument(f"--{name}")
    parser.add_argument(
        "--paraphrased", type=Path, help="folder with a poisoned train.tsv and test.tsv (Hidden Killer)"
    )
    parser.add_argument("--without_textattack", action="store_true")


def main() -> None:
    """Run the settings, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_inputs(parser)
    parser.add_argument("--only", nargs="+", help="names of settings")
    add_arguments(parser, "text_defects")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.paraphrased is not None:
        write_paraphrases(args.sst2, args.paraphrased, args.work_dir / "paraphrases.tsv")
    wanted = {name: options for name, options in settings(args).items() if not args.only or name in args.only}
    write(run_settings("audit_text_backdoors.py", wanted, args), args.output, "# Text defects")


if __name__ == "__main__":
    main()
