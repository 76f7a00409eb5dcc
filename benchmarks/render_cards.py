"""Render the cards of students in benchmarks/results, and the benchmark's own files, into model_cards/. Seconds.

    python benchmarks/render_cards.py

The students were measured, not uploaded, and each card says so. Every figure comes from the JSON files.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remos_hf import DefectReport
from remos_hf.sharing.benchmark import benchmark_files
from remos_hf.sharing.defect_kinds import defect_kind
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import Sidecars

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What each file measured, and with which command (benchmarks/README.md gives them in full).
TEXT = {
    "file": "text_defects.json",
    "teacher": "MiniLM",
    "kind": {"class": "BertForSequenceClassification", "library": "transformers"},
    "command": "python benchmarks/text_defects.py --teacher <MiniLM> --sst2 <folder> --imdb <folder> --work_dir work",
    "language": "en",
}
IMAGES = {
    "file": "image_defects.json",
    "teacher": "ResNet-20 (CIFAR-10)",
    "kind": {"class": "ImageClassifier", "library": "torch"},
    "command": "python benchmarks/image_defects.py --cifar <folder> --cifar_resnet resnet20-12fca82f.th --patch "
    "firefox.png --work_dir work --only cifar",
    "language": None,
}
GLUE_COMMAND = (
    "accelerate launch examples/run_glue_remos.py --model_name_or_path <MiniLM> --train_file train.tsv "
    "--validation_file dev.tsv --do_train --do_eval --strategy remos --slice_ratio 0.9 --max_train_samples 12800 "
    "--num_train_epochs 1 --learning_rate 1e-4 --per_device_train_batch_size 32 --bf16 --use_cpu --output_dir student"
)
STUDENTS = [
    (TEXT, "SST-2 to SST-2", "word", "remos 0.9"),
    (TEXT, "SST-2 to SST-2", "word", "random 0.9"),
    (TEXT, "SST-2 to SST-2", "word", "finetune"),
    (TEXT, "SST-2 to SST-2", "word", "finetune lr x3"),
    (TEXT, "SST-2 to SST-2", "textfooler", "remos 0.9"),
    (IMAGES, "CIFAR-10", "patch", "remos 0.97"),
    (IMAGES, "CIFAR-10", "patch", "finetune lr x3"),
    (IMAGES, "CIFAR-10", "penultimate", "remos 0.9"),
]


def slug(text: str) -> str:
    """Give a name that a repository may have."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def only(report: DefectReport, task: str, defect: str) -> DefectReport:
    """Keep one task's defect: the students of another backdoor have another teacher, so they are other models."""
    records = [one for one in report.records if (one["task"], one["defect"]) == (task, defect)]
    return DefectReport(records, report.settings, report.versions)


def record_of(about: Mapping[str, Any], report: DefectReport, task: str, defect: str, student: str) -> Sidecars:
    """Tell how a student came to be, as far as the report does; its weights and its slice were not kept."""
    (row,) = [row for row in report.tables()[task, defect] if row["student"] == student]
    made, settings = row["made"], report.settings["audits"][task]
    found = defect_kind(settings["defects"][defect]).found
    teacher = about["teacher"] if found else f"{about['teacher']} with the defect {defect!r}"
    config = {
        "strategy": made["strategy"],
        "teacher": {"id": teacher, "revision": None, "hash": None},
        "versions": report.versions,
        "student": about["kind"],
        "training": {
            "learning_rate": round(settings["learning_rate"] * made.get("lr_factor", 1.0), 12),
            "epochs": settings["epochs"],
            "batch_size": settings["batch_size"],
            "precision": "bf16" if settings["bf16"] else "fp32",
        },
    }
    if made.get("share_kept") is not None:
        config["slice"] = {"share_kept": made["share_kept"], "squares_reset": row["squares_reset"]}
    if made.get("share_never_covered") is not None:
        config["coverage"] = {
            "num_samples": settings["data"]["student"]["num_samples"],
            "data_fingerprint": settings["data"]["student"]["sha256"],
            "share_never_covered": made["share_never_covered"],
        }
    return Sidecars(config)


def cards() -> dict[str, str]:
    """Render all files, by name."""
    rendered = {f"defect-inheritance/{name}": text for name, text in benchmark_files().items()}
    for about, task, defect, student in STUDENTS:
        report = DefectReport.load(RESULTS / about["file"])
        repo_id = f"remos_hf/{slug(f'{task} {defect} {student}')}"
        card = model_card(
            record_of(about, report, task, defect, student),
            only(report, task, defect),
            repo_id=repo_id,
            student=student,
            task=task,
            command=about["command"],
            language=about["language"],
            published=False,
        )
        rendered[f"{repo_id.split('/')[1]}.md"] = str(card)
    glue = json.loads((RESULTS / "glue_sst2_remos_1_process.json").read_text())
    config = {
        "strategy": {"name": "Remos", "slice_ratio": 0.9},
        "teacher": {"id": "MiniLM"},
        "student": {"class": "BertForSequenceClassification", "library": "transformers"},
    }
    figures = {
        name: value for name, value in glue.items() if name in ("eval_accuracy", "eval_samples", "train_samples")
    }
    card = model_card(
        Sidecars(config),
        repo_id="remos_hf/glue-sst2-remos",
        dataset="SST-2",
        command=GLUE_COMMAND,
        language="en",
        metrics=figures,
        published=False,
    )
    return {**rendered, "glue-sst2-remos.md": str(card)}


def main() -> None:
    """Write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards")
    folder = parser.parse_args().output
    for name, text in cards().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
