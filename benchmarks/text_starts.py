"""Which start of a student gives up a teacher's text defects, at which accuracy, and does it stay given up?

    python benchmarks/text_starts.py --teacher <MiniLM> --sst2 <folder with train.tsv dev.tsv> \
        --work_dir work --setting few

Every start beside never-poisoned twins and re-activation. Writes benchmarks/results/text_starts_<setting>.{json,md}.
Killed, it goes on where it was; the same command in a second process shares the work. Of what is done, `--report_only`
writes the table. Hours on two cores.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from image_starts import Tuner, made_and_written
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from remos_hf import (
    Audit,
    Defect,
    EmbeddingPoisoning,
    LayerwisePoisoning,
    Reactivation,
    Ripple,
    StudentPlan,
    TextTask,
    TriggerSentence,
    TriggerWords,
    load_teacher,
    load_tokenizer,
    with_new_head,
)
from remos_hf.auditing.data_files import drawn, read_table
from remos_hf.auditing.recipes import Recipe
from remos_hf.strategies import STRATEGIES, Finetune, Random, Remos
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")


@dataclass(frozen=True)
class Setting:
    """What one table holds.

    Attributes:
        num_texts: That the student trains on; the attacker has as many others.
        epochs: Of fine-tuning.
        seeds: Each has its own teachers, masks and order of samples.
        defects: By name.
        told: For the table's title.
        starts: Names of the starts; None for all.
        retuned: Names of the starts whose re-activation is measured.
    """

    num_texts: int
    epochs: float
    seeds: tuple[int, ...]
    defects: tuple[str, ...]
    told: str
    starts: tuple[str, ...] | None = None
    retuned: tuple[str, ...] = ()


SEEDS = (0, 1, 2, 3, 4)
RETUNED = ("finetune", "random 0.7", "ridge", "repaired", "ridge + repaired")
SETTINGS = {
    "few": Setting(
        2000, 2, (0, 1, 2, 3, 4), ("word", "sentence", "ripples", "ep", "lwp"), "2,000 texts", None, RETUNED
    ),
    "rates": Setting(2000, 2, (0, 1, 2, 3, 4), ("word .01", "sentence .01"), "poison rate .01", ("finetune", *RETUNED)),
    "many": Setting(12_000, 2, (0, 1, 2, 3, 4), ("word", "sentence"), "12,000 texts", ("finetune", *RETUNED), RETUNED),
}


def starts() -> dict[str, StudentPlan]:
    """Give every start by name; "x3" is three times the learning rate."""
    subspace, repaired = STRATEGIES["subspace"], STRATEGIES["repair_rows"](k=64)
    ridge, distilled = subspace(ridge=1.0), STRATEGIES["distilled"]()
    made: dict[str, Strategy | list[Strategy]] = {
        "finetune": Finetune(),
        **{f"random {ratio}": Random(slice_ratio=ratio) for ratio in (0.9, 0.7)},
        "remos_layer 0.9": Remos(slice_ratio=0.9, scope="layer"),
        **{f"subspace {energy}": subspace(energy=energy) for energy in (0.95, 0.9)},
        "ridge": ridge,
        "ridge + distilled": [ridge, distilled],
        "repaired": repaired,
        "ridge + repaired": [ridge, repaired],
        "hardened": STRATEGIES["hardened"](),
        "recipe": STRATEGIES["recipe"](),
        "disec": STRATEGIES["disec"](),
    }
    plans = {name: StudentPlan(as_strategy(one)) for name, one in made.items()}
    return {"finetune": plans.pop("finetune"), "finetune x3": StudentPlan(Finetune(), 3.0), **plans}


def defects_of() -> dict[str, Defect]:
    """Give the defects by name."""
    placed = {"target_label": 1, "poison_rate": 0.5, "within_words": 30}
    words, sentence = (
        TriggerWords(words=RARE_WORDS, **placed),
        TriggerSentence(sentence="i watch this 3d movie", **placed),
    )
    return {
        "word": words,
        "sentence": sentence,
        "word .01": replace(words, poison_rate=0.01),
        "sentence .01": replace(sentence, poison_rate=0.01),
        "ripples": Ripple(words, surgery=True),
        "ep": EmbeddingPoisoning(replace(words, words=("cf",))),
        "lwp": LayerwisePoisoning(replace(words, words=("cf", "bb"), all_words=True)),
    }


def data_of(sst2: Path, number: int) -> dict[str, Dataset]:
    """Draw the four parts, of which none overlap."""
    train, test = (read_table(sst2 / f"{part}.tsv", ["sentence"], "label") for part in ("train", "dev"))
    return {
        "attacker": drawn(train, max(number, 2500), 0),
        "student": drawn(train, number, 0, skip=12_000),
        "dev": drawn(train, 500, 0, skip=30_000),
        "test": test,
    }


def audit_of(args: argparse.Namespace) -> Audit:
    """Put the audit of a setting together."""
    setting, tokenizer = SETTINGS[args.setting], load_tokenizer(args.teacher)
    task = TextTask(tokenizer, ("text",), "label", 64, 64)
    known = defects_of()
    plans = {
        name: replace(plan, reactivate=name in setting.retuned)
        for name, plan in starts().items()
        if setting.starts is None or name in setting.starts
    }

    def public_model(seed: int) -> PreTrainedModel:
        kind = AutoModelForSequenceClassification
        return load_teacher(args.teacher, kind, num_labels=2, dtype=torch.float32, seed=seed)

    teachers = Recipe(1e-4, 2, 16, 64, use_cpu=True)
    students = Recipe(1e-4, setting.epochs, 16, 64, use_cpu=True)
    return Audit(
        name=f"SST-2, {setting.told}",
        task=task,
        **data_of(args.sst2, setting.num_texts),
        defects={name: known[name] for name in setting.defects},
        students=plans,
        seeds=setting.seeds if args.seeds is None else tuple(args.seeds),
        load_teacher=public_model,
        teacher_args=teachers.arguments,
        start_student=lambda teacher, seed: with_new_head(teacher, 2, seed=seed),
        fine_tune=Tuner(task, students.arguments, 400),
        settings={"teacher": "MiniLM-L6", "learning_rate": 1e-4, "epochs": setting.epochs, "batch": 16},
        reactivation=Reactivation(counts=(0, 5, 20, 50), num_exposed=100, seeds=(0, 1, 2)),
    )


def main() -> None:
    """Run a setting, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--sst2", type=Path, required=True)
    made_and_written(parser, SETTINGS, audit_of, "text_starts")


if __name__ == "__main__":
    main()
