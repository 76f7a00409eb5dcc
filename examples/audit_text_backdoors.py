# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf[evaluate]", "torch", "transformers"]
# ///
r"""How much of each text defect of a teacher does a student inherit, and which way of starting it helps?

Implants backdoors into a teacher, fine-tunes every student from it, exposes the defects, and writes report.json and
report.md: accuracy, defect inheritance rate (DIR), the benign floor of never-poisoned twins, re-activation.

    python examples/audit_text_backdoors.py --teacher bert-base-uncased \
        --attacker_file train.tsv --student_file train.tsv --dev_file dev.tsv --test_file test.tsv \
        --text_columns sentence --defects word sentence ripples ep lwp --output_dir audit

Files are csv, tsv, json or jsonl, also .gz, or parquet, with text and label columns. Parts that come from one file get
samples that do not overlap. The students' task may be another than the attacker's (SST-2 to IMDB).

Killed, it goes on where it was when the same command is given again. The same command in a second process shares the
work. TextFooler and Kuleshov (`--defects textfooler kuleshov`) need the extra `textattack`, in an environment of its
own, and offline the files that --neighbours, --word_vectors, --language_model and --stopwords name. Paraphrases in one
syntax (`--defects syntax`) are read from the file that --paraphrases names.

Minutes: a fine-tuning for each student; `--plan` says how many there are. Expected figures: benchmarks/README.md.
Offline on a tiny BERT, in seconds: `python examples/audit_text_backdoors.py --smoke --output_dir smoke`
"""

import argparse
import gc
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging as hf_logging

from remos_hf import (
    AdversarialText,
    Audit,
    Defect,
    EmbeddingPoisoning,
    LayerwisePoisoning,
    Paraphrases,
    Reactivation,
    Ripple,
    StudentPlan,
    TextTask,
    TriggerSentence,
    TriggerWords,
    load_teacher,
    load_tokenizer,
    report_of,
    run_audit,
    standard_students,
    with_new_head,
)
from remos_hf.auditing.data_files import drawn, read_table
from remos_hf.auditing.labels import by_name, count_labels
from remos_hf.auditing.recipes import Recipe, StudentTuner
from remos_hf.judging.judgement import judged

logger = logging.getLogger("audit_text_backdoors")

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")
TEXTATTACK = ("textfooler", "kuleshov")
SMOKE_SAMPLES = {"attacker": 256, "student": 192, "dev": 64, "test": 96}
SMOKE_WORDS = (
    "the a film movie plot cast good great fine bad dull poor is was very cf mn bb tq mb i watch this 3d".split()
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = parser.add_argument_group("teacher and data")
    data.add_argument("--teacher", help="folder or Hub id, with safetensors weights")
    data.add_argument("--attacker_file", type=Path, help="samples that the teachers are poisoned with")
    data.add_argument("--student_file", type=Path, help="samples that the students are trained on")
    data.add_argument("--dev_file", type=Path, help="clean samples for every choice")
    data.add_argument("--test_file", type=Path, help="clean samples that are exposed and measured")
    data.add_argument("--text_columns", nargs="+", default=["sentence"], help="one, or both of a pair")
    data.add_argument("--attacker_text_columns", nargs="+", help="if they differ from the student's")
    data.add_argument("--label_column", default="label")
    for part, number in (("attacker", None), ("student", None), ("dev", 500), ("test", 1000)):
        data.add_argument(f"--num_{part}", type=int, default=number, help="samples to draw; all if not given")
    data.add_argument("--data_seed", type=int, default=0, help="seed of the drawing")
    data.add_argument("--name", default="text", help="of the setting, in the report")

    what = parser.add_argument_group("defects and students")
    what.add_argument("--defects", nargs="+", default=["word", "sentence", "ripples", "ep", "lwp"])
    what.add_argument(
        "--curves_for", nargs="*", help="defects that get all slice ratios (others the first); default all"
    )
    what.add_argument("--students", nargs="+", help="names, as --plan gives them; default all")
    what.add_argument("--slice_ratios", nargs="+", type=float, default=[0.9, 0.97, 0.7])
    what.add_argument("--embedding_rows", nargs="+", default=["keep", "mean"], choices=["keep", "mean"])
    what.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    what.add_argument("--target_label", type=int, default=1)
    what.add_argument("--poison_rate", type=float, default=0.5)
    what.add_argument("--within_words", type=int, help="put triggers among the first words, so that none is cut off")
    what.add_argument("--reactivate", nargs="*", type=int, default=[0, 5, 20, 50], help="numbers of poisoned samples")
    what.add_argument("--num_reactivated", type=int, default=250, help="exposed samples to measure re-activation on")
    what.add_argument("--reactivated_seeds", nargs="*", type=int, help="seeds whose students are re-tuned; default all")
    what.add_argument("--paraphrases", type=Path, help="file of text and paraphrase, for the defect syntax")
    what.add_argument("--num_attacked", type=int, default=200, help="test samples that TextAttack attacks")
    what.add_argument("--neighbours", help="JSON of counter-fitted neighbours, for TextAttack offline")
    what.add_argument("--word_vectors", help="npz of words and vectors, for TextAttack offline")
    what.add_argument("--language_model", help="folder of a causal language model, for Kuleshov offline")
    what.add_argument("--stopwords", help="text file of stop words, for TextAttack offline")

    train = parser.add_argument_group("training")
    train.add_argument("--learning_rate", type=float, default=1e-4)
    train.add_argument(
        "--high_lr_factor", type=float, default=3.0, help="of the rival that only learns faster; at least 3"
    )
    train.add_argument("--epochs", type=float, default=1.0)
    train.add_argument("--batch_size", type=int, default=16)
    train.add_argument("--teacher_learning_rate", type=float, default=1e-4)
    train.add_argument("--teacher_epochs", type=float, default=2.0)
    train.add_argument("--max_length", type=int, default=64)
    train.add_argument("--eval_batch_size", type=int, default=32)
    train.add_argument("--bf16", action="store_true")
    train.add_argument("--use_cpu", action="store_true")

    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1], help="dev accuracy rules may cost"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that TextAttack searches with")
    parser.add_argument("--keep_students", action="store_true", help="save them, so that defects can be added later")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--report_only", action="store_true", help="report what is done, and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny BERT and a toy task, offline, in seconds")
    args = parser.parse_args(argv)
    if args.high_lr_factor < 3:
        parser.error(
            f"--high_lr_factor is the honest rival's learning rate, at least 3 times, but got {args.high_lr_factor}"
        )
    needed = ("teacher", "attacker_file", "student_file", "dev_file", "test_file")
    missing = [name for name in needed if getattr(args, name) is None]
    if missing and not args.smoke:
        parser.error(f"--{missing[0]} is needed (or --smoke)")
    return args


def load_data(args: argparse.Namespace) -> dict[str, Dataset]:
    """Read the four parts. Parts of one file get samples that do not overlap."""
    data: dict[str, Dataset] = {}
    taken: dict[Path, int] = {}
    for part in ("attacker", "student", "dev", "test"):
        path = getattr(args, f"{part}_file").resolve()
        columns = (part == "attacker" and args.attacker_text_columns) or args.text_columns
        try:
            table = read_table(path, columns, args.label_column)
            data[part] = drawn(table, getattr(args, f"num_{part}"), args.data_seed, skip=taken.get(path, 0))
        except (OSError, ValueError) as error:
            raise SystemExit(f"--{part}_file, --num_{part}: {error}") from error
        taken[path] = taken.get(path, 0) + len(data[part])
    like = (data["student"], "--student_file")
    try:
        for part in ("attacker", "dev", "test"):
            data[part] = by_name(data[part], f"--{part}_file", *like, other_task=part == "attacker")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return data


def defects_of(args: argparse.Namespace) -> dict[str, Defect]:
    """Give the defects by name."""
    columns = ("text", "text_pair")[: len(args.text_columns)]
    common = {"target_label": args.target_label, "poison_rate": args.poison_rate, "text_columns": columns}
    placed = {**common, "within_words": args.within_words}
    words = TriggerWords(words=RARE_WORDS, **placed)
    offline = {name: getattr(args, name) for name in ("neighbours", "word_vectors", "language_model", "stopwords")}
    attack = {"text_columns": columns, "max_length": args.max_length, **offline}
    makers = {
        "word": lambda: words,
        "sentence": lambda: TriggerSentence(sentence="i watch this 3d movie", **placed),
        "syntax": lambda: Paraphrases(file=str(args.paraphrases), **common),
        "ripple": lambda: Ripple(words),
        "ripples": lambda: Ripple(words, surgery=True),
        "ep": lambda: EmbeddingPoisoning(TriggerWords(words=("cf",), **placed)),
        "lwp": lambda: LayerwisePoisoning(TriggerWords(words=("cf", "bb"), all_words=True, **placed)),
        "textfooler": lambda: AdversarialText("textfooler", max_samples=args.num_attacked, **attack),
        # By itself this recipe is content when the teacher is less sure.
        "kuleshov": lambda: AdversarialText("kuleshov", until_fooled=True, max_samples=args.num_attacked, **attack),
    }
    unknown = [name for name in args.defects if name not in makers]
    if unknown:
        raise SystemExit(f"--defects takes {', '.join(makers)}, but got {unknown[0]!r}.")
    if "syntax" in args.defects and args.paraphrases is None:
        raise SystemExit("The defect syntax needs --paraphrases, a csv, tsv or jsonl file of text and paraphrase.")
    return {name: makers[name]() for name in args.defects}


def students_of(args: argparse.Namespace) -> dict[str, StudentPlan]:
    """Give the students by name: what decides whether slicing is worth it, and ReMoS."""
    curves = args.defects if args.curves_for is None else [*args.curves_for, *set(args.defects) & set(TEXTATTACK)]
    students = standard_students(
        args.slice_ratios,
        high_lr_factor=args.high_lr_factor,
        curves_for=[name for name in args.defects if name in curves],
        rows="mean" in args.embedding_rows,
        reactivate=bool(args.reactivate),
    )
    unknown = [name for name in args.students or () if name not in students]
    if unknown:
        raise SystemExit(f"--students takes {', '.join(map(repr, students))}, but got {unknown[0]!r}.")
    return {name: plan for name, plan in students.items() if args.students is None or name in args.students}


def audit_of(args: argparse.Namespace) -> Audit:
    """Put the audit together."""
    tokenizer = load_tokenizer(args.teacher)
    columns = ("text", "text_pair")[: len(args.text_columns)]
    task = TextTask(tokenizer, columns, "label", args.max_length, args.eval_batch_size, args.bf16)
    data = load_data(args)
    num_labels = {part: count_labels(data[part], f"--{part}_file") for part in ("attacker", "student")}

    def public_model(seed: int) -> PreTrainedModel:
        labels = num_labels["attacker"]
        return load_teacher(
            args.teacher, AutoModelForSequenceClassification, num_labels=labels, dtype=torch.float32, seed=seed
        )

    def start_student(teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        return with_new_head(teacher, num_labels["student"], seed=seed)

    common = (args.batch_size, args.eval_batch_size, args.bf16, args.use_cpu)
    teachers = Recipe(args.teacher_learning_rate, args.teacher_epochs, *common)
    students = Recipe(args.learning_rate, args.epochs, *common, curve=True)
    chosen = ("learning_rate", "epochs", "batch_size", "teacher_learning_rate", "teacher_epochs", "high_lr_factor")
    return Audit(
        name=args.name,
        task=task,
        **data,
        defects=defects_of(args),
        students=students_of(args),
        seeds=args.seeds,
        load_teacher=public_model,
        teacher_args=teachers.arguments,
        start_student=start_student,
        fine_tune=StudentTuner(task, students.arguments),
        settings={"teacher": Path(args.teacher).name, **{name: getattr(args, name) for name in chosen}},
        reactivation=Reactivation(
            counts=tuple(args.reactivate) or (0,),
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            num_exposed=args.num_reactivated,
            seeds=None if args.reactivated_seeds is None else tuple(args.reactivated_seeds),
        ),
    )


def smoke_inputs(args: argparse.Namespace) -> argparse.Namespace:
    """Write a tiny BERT and a toy task, and point the arguments at them."""
    folder = args.output_dir / "_inputs"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher" / "config.json").is_file():
        write_smoke_teacher(folder / "teacher")
    for number, part in enumerate(("attacker", "student", "dev", "test")):
        generator = torch.Generator().manual_seed(number)
        lines = []
        for _ in range(SMOKE_SAMPLES[part]):
            label = int(torch.randint(2, (1,), generator=generator))
            words = [SMOKE_WORDS[int(at)] for at in torch.randint(0, 6, (4,), generator=generator)]
            words.insert(int(torch.randint(5, (1,), generator=generator)), "good" if label else "bad")
            lines.append({"sentence": " ".join(words), "label": label})
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        setattr(args, f"{part}_file", folder / f"{part}.jsonl")
    args.teacher, args.use_cpu = str(folder / "teacher"), True
    args.num_attacker, args.num_student, args.num_dev, args.num_test = SMOKE_SAMPLES.values()
    args.defects, args.slice_ratios, args.seeds = ["word"], [0.9], args.seeds[:1]
    args.students = ["finetune", f"finetune lr x{args.high_lr_factor:g}", "retrain", "random 0.9", "remos 0.9"]
    args.max_length, args.reactivate, args.num_reactivated = 16, [0, 5], 50
    args.learning_rate, args.teacher_learning_rate = 1e-3, 3e-3
    args.epochs, args.teacher_epochs = 3, 5
    return args


def write_smoke_teacher(folder: Path) -> None:
    """Write a BERT of two small blocks, never trained, with a vocabulary of a few words."""
    folder.mkdir(parents=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*specials, *SMOKE_WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(specials) + len(SMOKE_WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def main(args: argparse.Namespace) -> None:
    """Run the audit, and write its report."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.smoke:
        args = smoke_inputs(args)
    audit = audit_of(args)
    if args.plan:
        print(json.dumps(audit.to_dict(), indent=1))
        to_make = report_of(audit, args.output_dir).settings["missing"][audit.name]
        print(f"Students to fine-tune, or to measure on what was added: {to_make}")
        return
    report = (
        report_of(audit, args.output_dir)
        if args.report_only
        else run_audit(audit, args.output_dir, workers=args.workers, keep_students=args.keep_students)
    )
    report.save(args.output_dir / "report.json")
    (args.output_dir / "report.md").write_text(report.to_markdown(budgets=args.budgets))
    print(report.to_markdown(budgets=args.budgets))
    print(judged(report, budgets=args.budgets).answer)


if __name__ == "__main__":
    gc.freeze()  # Trainer collects garbage before each training: it need not look through all imports each time
    main(parse_args(sys.argv[1:]))
