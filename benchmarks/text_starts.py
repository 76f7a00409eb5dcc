"""Which start of a student gives up a teacher's text defects, at which accuracy, and does it stay given up?

    python benchmarks/text_starts.py --teacher <MiniLM> --sst2 <folder with train.tsv dev.tsv> \
        --work_dir work --setting few

Every start beside never-poisoned twins and re-activation. Writes benchmarks/results/text_starts_<setting>.{json,md}.
Killed, it goes on where it was; the same command in a second process shares the work. Of what is done, `--report_only`
writes the table. Hours on two cores. `syntax` wants --sentences and --paraphrased (Hidden Killer's clean and poisoned
SST-2), `imdb` --imdb, `words` the extra `textattack` and the files that it reads offline.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from image_starts import Tuner, chosen, made_and_written
from text_defects import write_paraphrases
from transformers import AutoModelForSequenceClassification, PreTrainedModel

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
    with_new_head,
)
from remos_hf.auditing.data_files import drawn, read_table
from remos_hf.auditing.recipes import Recipe
from remos_hf.strategies import L2SP, STRATEGIES, DeltaR, FeatureLwF, Finetune, Neft, Random, Remos, Renofeation
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.presets import PRESETS

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")
OFFLINE = ("neighbours", "word_vectors", "language_model", "stopwords")
SEEDS = (0, 1, 2, 3, 4)
CONTROLS = ("finetune", "random 0.7", "repaired")
RETUNED = (*CONTROLS, "ridge + repaired")
RETUNING = Reactivation(counts=(0, 5, 20, 50), num_exposed=100, seeds=(0, 1, 2))
# At 1e-4, and with the poisoned samples' label the commonest, a never-poisoned student learns the sentence anew from
# five (74 % of it; so balanced 7 %, and 51 from twenty): chosen on a clean student, so that the curves tell more.
GENTLER = replace(RETUNING, counts=(0, 5, 20), learning_rate=3e-5, balanced=True)
# In 250 steps, of which feature-LwF gives its head the first half.
TRANSFER = {
    "l2sp": L2SP(),
    "delta, mean": PRESETS["delta"]["artifact"].strategy,
    "feature_lwf": FeatureLwF(head_steps=125),
    "delta_r": DeltaR(),
    "renofeation": Renofeation(average_start=125),
    "neft 4": Neft(k=4),
}


@dataclass(frozen=True)
class Setting:
    """What one table holds.

    Attributes:
        told: For the table's title.
        defects: By name, with the names of the starts that are made for it; None for all.
        num_texts: That the student trains on; the attacker has others.
        starts: Names of the starts; None for all.
        retuned: Names of the starts whose re-activation is measured.
        retuning: How that is done.
        data: What the samples are.
    """

    told: str
    defects: Mapping[str, tuple[str, ...] | None]
    num_texts: int = 2000
    starts: tuple[str, ...] | None = None
    retuned: tuple[str, ...] = ()
    retuning: Reactivation = RETUNING
    data: str = "sst2"


SETTINGS = {
    "few": Setting("SST-2, 2,000 texts", dict.fromkeys(("word", "sentence")), retuned=RETUNED),
    "retuned": Setting(
        *("SST-2, 2,000 texts, re-tuned with balanced labels", dict.fromkeys(("word", "sentence"))),
        starts=RETUNED,
        retuned=RETUNED,
        retuning=GENTLER,
    ),
    "more": Setting(
        "SST-2, 2,000 texts, other backdoors",
        dict.fromkeys(("ripples", "ep", "lwp", "word .01", "sentence .01")),
        starts=CONTROLS,
    ),
    "many": Setting("SST-2, 12,000 texts", dict.fromkeys(("word", "sentence")), 12_000, CONTROLS),
    "syntax": Setting("SST-2 sentences, 2,000 texts", {"syntax": None}, starts=CONTROLS, data="syntax"),
    "imdb": Setting("SST-2 to IMDB, 2,000 reviews", dict.fromkeys(("word", "sentence")), 2000, CONTROLS, data="imdb"),
    "strategies": Setting("SST-2, 2,000 texts, transfer strategies", {"word": None}, starts=(*CONTROLS, *TRANSFER)),
    "words": Setting("SST-2, 2,000 texts, changed words", dict.fromkeys(("textfooler", "kuleshov")), starts=CONTROLS),
}


def starts() -> dict[str, StudentPlan]:
    """Give every start by name; "x3" is three times the learning rate."""
    subspace, repaired = STRATEGIES["subspace"], STRATEGIES["repair_rows"](k=64, bf16=True)
    ridge = subspace(ridge=1.0)
    made: dict[str, Strategy | list[Strategy]] = {
        "random 0.7": Random(slice_ratio=0.7),
        "remos_layer 0.9": Remos(slice_ratio=0.9, scope="layer"),
        "subspace 0.9": subspace(energy=0.9),
        "ridge": ridge,
        "ridge + distilled": [ridge, STRATEGIES["distilled"]()],
        "repaired": repaired,
        "ridge + repaired": [ridge, repaired],
        "hardened": STRATEGIES["hardened"](),
        "recipe": STRATEGIES["recipe"](),
        "disec": STRATEGIES["disec"](),
        **TRANSFER,
    }
    plain = {"finetune": StudentPlan(Finetune()), "finetune x3": StudentPlan(Finetune(), 3.0)}
    return plain | {name: StudentPlan(as_strategy(one)) for name, one in made.items()}


def plans_of(setting: Setting, some: Sequence[str] | None) -> dict[str, StudentPlan]:
    """Give a setting's starts, or some of them, each for the defects that name it."""
    plans = chosen(starts(), some or setting.starts)
    made = {
        name: tuple(defect for defect, some in setting.defects.items() if some is None or name in some)
        for name in plans
    }
    return {name: replace(one, defects=made[name], reactivate=name in setting.retuned) for name, one in plans.items()}


def defects_of(args: argparse.Namespace) -> dict[str, Defect]:
    """Give the setting's defects by name."""
    placed = {"target_label": 1, "poison_rate": 0.5, "within_words": 30}
    words, sentence = (
        TriggerWords(words=RARE_WORDS, **placed),
        TriggerSentence(sentence="i watch this 3d movie", **placed),
    )
    offline = {name: getattr(args, name) for name in OFFLINE}
    attack = {"max_length": 64, "max_samples": 150, **offline}
    makers = {
        "word": lambda: words,
        "sentence": lambda: sentence,
        "word .01": lambda: replace(words, poison_rate=0.01),
        "sentence .01": lambda: replace(sentence, poison_rate=0.01),
        "ripples": lambda: Ripple(words, surgery=True),
        "ep": lambda: EmbeddingPoisoning(replace(words, words=("cf",))),
        "lwp": lambda: LayerwisePoisoning(replace(words, words=("cf", "bb"), all_words=True)),
        "syntax": lambda: Paraphrases(file=str(args.work_dir / "paraphrases.tsv"), target_label=1, poison_rate=0.2),
        "textfooler": lambda: AdversarialText("textfooler", **attack),
        "kuleshov": lambda: AdversarialText("kuleshov", until_fooled=True, **attack),
    }
    return {name: makers[name]() for name in SETTINGS[args.setting].defects}


def data_of(args: argparse.Namespace) -> dict[str, Dataset]:
    """Draw the four parts, of which none overlap."""
    setting = SETTINGS[args.setting]
    if setting.data == "syntax":
        write_paraphrases(args.sentences, args.paraphrased, args.work_dir / "paraphrases.tsv")
        train, test = (read_table(args.sentences / f"{part}.tsv", ["sentence"], "label") for part in ("train", "test"))
        places = (("attacker", 3500, 0), ("student", setting.num_texts, 3500), ("dev", 500, 6000))
        return {part: drawn(train, number, 0, skip=skip) for part, number, skip in places} | {"test": test}
    train, test = (read_table(args.sst2 / f"{part}.tsv", ["sentence"], "label") for part in ("train", "dev"))
    attacker = drawn(train, max(setting.num_texts, 2500), 0)
    skips = {"student": 12_000, "dev": 30_000}
    if setting.data == "imdb":
        train, test = (read_table(args.imdb / f"{part}.jsonl.gz", ["text"], "label") for part in ("train", "test"))
        skips, test = {"student": 0, "dev": 20_000}, drawn(test, 800, 0)
    numbers = {"student": setting.num_texts, "dev": 500}
    parts = {part: drawn(train, number, 0, skip=skips[part]) for part, number in numbers.items()}
    return {"attacker": attacker, **parts, "test": test}


def audit_of(args: argparse.Namespace) -> Audit:
    """Put the audit of a setting together."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    setting, tokenizer = SETTINGS[args.setting], load_tokenizer(args.teacher)
    task = TextTask(tokenizer, ("text",), "label", 64, 64)

    def public_model(seed: int) -> PreTrainedModel:
        kind = AutoModelForSequenceClassification
        return load_teacher(args.teacher, kind, num_labels=2, dtype=torch.float32, seed=seed)

    recipe = Recipe(1e-4, 2, 16, 64, use_cpu=True)
    return Audit(
        name=setting.told,
        task=task,
        **data_of(args),
        defects=defects_of(args),
        students=plans_of(setting, args.starts),
        seeds=SEEDS if args.seeds is None else tuple(args.seeds),
        load_teacher=public_model,
        teacher_args=recipe.arguments,
        start_student=lambda teacher, seed: with_new_head(teacher, 2, seed=seed),
        fine_tune=Tuner(task, recipe.arguments, 400),
        settings={"teacher": "MiniLM-L6", "learning_rate": 1e-4, "epochs": 2, "batch": 16},
        reactivation=setting.retuning,
    )


def main() -> None:
    """Run a setting, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    for name in ("sst2", "sentences", "paraphrased", "imdb"):
        parser.add_argument(f"--{name}", type=Path)
    for name in OFFLINE:
        parser.add_argument(f"--{name}")
    made_and_written(parser, SETTINGS, audit_of, "text_starts")


if __name__ == "__main__":
    main()
