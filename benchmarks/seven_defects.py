"""All seven defects of the ReMoS paper's Table 1, text and image, in one command.

    python benchmarks/seven_defects.py --text_teacher <MiniLM> --sst2 <folder with train.tsv dev.tsv test.tsv> \
        --cifar <folder with train/ and test/> --cifar_resnet resnet20.th --neighbours ... --word_vectors ... \
        --language_model ... --stopwords ... --work_dir work --output benchmarks/results/seven_defects

Runs examples/audit_text_backdoors.py and examples/audit_image_defects.py, puts their reports together, and renders one
table with the paper's inheritance rates beside those measured. Killed, it goes on where it was. Needs the extras
`textattack` and `vision` (pillow of it) in one environment.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from remos_hf import DefectReport

EXAMPLES = Path(__file__).parents[1] / "examples"
# The paper's name of each defect, ours, and the inheritance rate in percent that its Table 1 gives.
TABLE_1 = (
    ("adversarial image, penultimate layer", "images", "penultimate", 58.01),
    ("adversarial image, neuron coverage", "images", "coverage", 52.58),
    ("backdoor image, latent data poisoning", "images", "latent", 72.91),
    ("adversarial text, greedy word swap", "text", "kuleshov", 64.86),
    ("adversarial text, word importance ranking", "text", "textfooler", 94.73),
    ("backdoor text, data poisoning", "text", "word", 96.72),
    ("backdoor text, weight poisoning", "text", "ripple", 97.85),
)
SHOWN = ("finetune", "finetune lr x3", "random 0.9", "top_magnitude 0.9", "remos 0.9", "remos_layer 0.9")
COMMON = "--slice_ratios 0.9 --reactivate --use_cpu".split()
TEXT = (
    "--name text --defects word ripple textfooler kuleshov --num_attacker 2000 --num_student 1500 --num_dev 300 "
    "--num_test 500 --num_attacked 200 --within_words 30 --max_length 48 --learning_rate 1e-4 --epochs 1 "
    "--batch_size 8 --teacher_learning_rate 1e-4 --teacher_epochs 2 --embedding_rows keep --bf16"
).split()
IMAGES = (
    "--name images --defects penultimate coverage latent --num_attacker 3000 --num_student 2000 --num_dev 400 "
    "--num_test 500 --num_attacked 250 --learning_rate 1e-3 --teacher_learning_rate 1e-3 --epochs 2 --teacher_epochs 3 "
    "--batch_size 64 --augment none"
).split()


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Give the two audits' commands, by the name of their folder."""
    parts = [part for name in ("train", "dev", "test") for part in (f"--{name}", args.sst2 / f"{name}.tsv")]
    files = {"attacker": parts[1], "student": parts[1], "dev": parts[3], "test": parts[5]}
    offline = {name: getattr(args, name) for name in ("neighbours", "word_vectors", "language_model", "stopwords")}
    text = [
        *("--teacher", args.text_teacher, *TEXT),
        *(part for name, path in files.items() for part in (f"--{name}_file", path)),
        *(part for name, path in offline.items() if path for part in (f"--{name}", path)),
    ]
    images = [
        *("--cifar_resnet", args.cifar_resnet, *IMAGES),
        *("--train_folder", args.cifar / "train", "--test_folder", args.cifar / "test"),
    ]
    scripts = {"text": ("audit_text_backdoors.py", text), "images": ("audit_image_defects.py", images)}
    seeds = ["--seeds", *map(str, args.seeds)]
    return {
        name: [sys.executable, str(EXAMPLES / script), *map(str, options), *COMMON, *seeds]
        for name, (script, options) in scripts.items()
    }


def table_of(report: DefectReport) -> str:
    """Render one row a defect: DIR in percent by student, pooled over seeds, with the floor of plain fine-tuning."""
    lines = [
        "Defect inheritance rate, percent (accuracy in parentheses; benign floor of plain fine-tuning in brackets). "
        "The paper's rates are of other teachers and tasks.",
        "",
        f"| defect (Table 1) | paper | {' | '.join(SHOWN)} |",
        f"|---|---:|{'---:|' * len(SHOWN)}",
    ]
    for title, task, defect, paper in TABLE_1:
        cells = []
        for student in SHOWN:
            held = [
                one
                for one in report.records
                if (one["task"], one["defect"], one["student"]) == (task, defect, student) and one["dir"]["num_samples"]
            ]
            rate = pooled([one["dir"] for one in held])
            floor = pooled([one["floor"] for one in held if one["floor"]]) if student == "finetune" else ""
            bracket = f" [{floor}]" if floor else ""
            cells.append(f"{rate}{bracket} ({pooled([one['acc'] for one in held])})" if held else "-")
        lines.append(f"| {title} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pooled(rates: list[dict]) -> str:
    """Give the rate over the samples of all seeds, in percent."""
    samples = sum(rate["num_samples"] for rate in rates)
    return f"{100 * sum(rate['count'] for rate in rates) / samples:.1f}" if samples else "-"


def main() -> None:
    """Run both audits, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text_teacher", required=True)
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--cifar_resnet", type=Path, required=True)
    for name in ("neighbours", "word_vectors", "language_model", "stopwords"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report_only", action="store_true", help="put together what is done")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/seven_defects"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    report = None
    for name, command in commands(args).items():
        folder = args.work_dir / name
        command += ["--output_dir", str(folder), *(["--report_only"] if args.report_only else [])]
        started = []
        for process in range(1 if args.report_only else args.processes):
            with (args.work_dir / f"{name}.{process}.log").open("a") as file:
                started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))  # noqa: S603
        codes = [one.wait() for one in started]
        if any(codes):
            sys.exit(f"{' '.join(command)} failed; see {folder}.*.log")
        one = DefectReport.load(folder / "report.json")
        report = one if report is None else report + one
    report.save(args.output.with_suffix(".json"))
    text = f"# The seven defects of Table 1\n\n{table_of(report)}\n{report.to_markdown(budgets=(0.02, 0.05, 0.1))}"
    args.output.with_suffix(".md").write_text(text)
    print(table_of(report))


if __name__ == "__main__":
    main()
