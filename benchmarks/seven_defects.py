"""All seven defects of the ReMoS paper's Table 1, text and image, in one command.

    python benchmarks/seven_defects.py --teacher <MiniLM> --sst2 <folder> --imdb <folder> --neighbours ... \
        --word_vectors ... --language_model ... --stopwords ... --cifar <folder> --cifar_resnet resnet20.th \
        --patch firefox.png --work_dir work --output benchmarks/results/seven_defects

Runs the setting SST-2 to SST-2 of text_defects.py and the setting CIFAR-10 of image_defects.py, whose arguments these
are, and puts one table beside the paper's: what either has done in the same `--work_dir` is not done again. Killed, it
goes on where it was. Needs the extras `textattack` and pillow of `vision` in one environment.
"""

import argparse
from dataclasses import replace

import image_defects
import text_defects
from audit_runs import add_arguments, run_settings, write

from remos_hf import DefectReport, Rate

# The paper's name of each defect, ours, and the inheritance rate in percent that its Table 1 gives.
TABLE_1 = (
    ("adversarial image, penultimate layer", "CIFAR-10", "penultimate", 58.01),
    ("adversarial image, neuron coverage", "CIFAR-10", "coverage", 52.58),
    ("backdoor image, latent data poisoning", "CIFAR-10", "latent", 72.91),
    ("adversarial text, greedy word swap", "SST-2 to SST-2", "kuleshov", 64.86),
    ("adversarial text, word importance ranking", "SST-2 to SST-2", "textfooler", 94.73),
    ("backdoor text, data poisoning", "SST-2 to SST-2", "word", 96.72),
    ("backdoor text, weight poisoning", "SST-2 to SST-2", "ripples", 97.85),
)
SHOWN = ("finetune", "finetune lr x3", "retrain", "random 0.9", "top_magnitude 0.9", "mag_prune 0.9", "remos 0.9")


def of_table_1(report: DefectReport) -> DefectReport:
    """Keep the records of the seven defects."""
    wanted = {(task, defect) for _, task, defect, _ in TABLE_1}
    return replace(report, records=[one for one in report.records if (one["task"], one["defect"]) in wanted])


def table_of(report: DefectReport) -> str:
    """Render one row a defect: DIR in percent by student, pooled over seeds, with the floor of plain fine-tuning."""
    lines = [
        "Defect inheritance rate, percent (accuracy in parentheses; benign floor of plain fine-tuning in brackets). "
        "The paper's rates are of plain fine-tuning of other teachers on other tasks.",
        "",
        f"| defect (Table 1) | paper | {' | '.join(SHOWN)} |",
        f"|---|---:|{'---:|' * len(SHOWN)}",
    ]
    tables = report.tables()
    for title, task, defect, paper in TABLE_1:
        rows = {row["student"]: row for row in tables.get((task, defect), ())}
        cells = []
        for student in SHOWN:
            row = rows.get(student)
            floor = f" [{percent(row['floor'])}]" if row and row["floor"] and student == "finetune" else ""
            cells.append(f"{percent(row['dir'])}{floor} ({percent(row['acc'])})" if row else "-")
        lines.append(f"| {title} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(rate: Rate) -> str:
    """Give a rate in percent; none where nothing was counted."""
    return "-" if rate.value is None else f"{100 * rate.value:.1f}"


def main() -> None:
    """Run both audits, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text_defects.add_inputs(parser)
    image_defects.add_inputs(parser)
    add_arguments(parser, "seven_defects")
    args = parser.parse_args()
    texts = {"sst2_sst2": text_defects.settings(args)["sst2_sst2"]}
    images = {"cifar": image_defects.settings(args)["cifar"]}
    found = [
        run_settings("audit_text_backdoors.py", texts, args),
        run_settings("audit_image_defects.py", images, args),
    ]
    held = [of_table_1(one) for one in found if one is not None]
    report = sum(held[1:], held[0]) if held else None
    heading = "# The seven defects of Table 1" + ("" if report is None else f"\n\n{table_of(report)}")
    write(report, args.output, heading)


if __name__ == "__main__":
    main()
