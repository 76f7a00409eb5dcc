"""How often does the scan of a student call an input suspicious that nobody planted, and how often one that was?

    python benchmarks/scan_false_alarms.py --teacher <MiniLM> --data <folder> --work_dir work [--share 0 2]

Small students of one encoder on six tasks, several seeds, started from the public teacher and from one that was
fine-tuned on other samples of the task; and students of teachers with implanted backdoors. Each is scanned by itself
and beside the clean student of another seed. Thresholds were chosen on the cells of part "chosen"; what is published
is counted on part "counted". Killed, it goes on where it was: students lie in the work folder, what was found in
scan_false_alarms.json. Three to eight minutes a student on one core.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from remos_hf.adapters.tables import read_rows
from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.defects.backdoor import Backdoor, fine_tune
from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.samples import tokenize
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.evaluation.measures import Rate
from remos_hf.evaluation.tasks import TextTask
from remos_hf.evaluation.transfer import measure
from remos_hf.judging.suspects import CANNOT, SUSPICIOUS, verdict_of_scan
from remos_hf.scanning.suspects import Scan
from remos_hf.scanning.tokens import scan_tokens
from remos_hf.whole import replace_file, whole_file

MAX_LENGTH = 64
OTHERS = ("imdb", "agnews", "offenseval")
ATTACKER = 2500  # samples of the teacher's own training, where there is one
DEFECTS: dict[str, Backdoor] = {
    "word": TriggerWords(within_words=30),
    "sentence": TriggerSentence(within_words=30),
    "ripples": Ripple(TriggerWords(within_words=30), surgery=True),
    "ep": EmbeddingPoisoning(TriggerWords(words=("cf",), within_words=30)),
    "lwp": LayerwisePoisoning(TriggerWords(words=("cf", "bb"), all_words=True, within_words=30)),
}


@dataclass(frozen=True)
class Cell:
    """One student.

    Attributes:
        part: "chosen" (thresholds were chosen on it) or "counted".
        task: Its task.
        seed: Of its head, its samples and its training.
        samples: It was trained on.
        teacher: "public", "tuned" on clean samples, or the name of a defect.
        epochs: Of the student's training.
    """

    part: str
    task: str
    seed: int
    samples: int
    teacher: str = "public"
    epochs: int = 1

    @property
    def clean(self) -> bool:
        """Whether nobody planted anything."""
        return self.teacher not in DEFECTS

    @property
    def reference(self) -> "Cell":
        """Give the clean student of another seed that it is scanned beside."""
        alike = [one for one in CELLS if (one.part, one.task, one.teacher) == (self.part, self.task, "public")]
        return next(one for one in alike if one.seed != self.seed)

    @property
    def name(self) -> str:
        """Name its files."""
        return f"{self.task}-{self.samples}x{self.epochs}-{self.teacher}-{self.seed}"


CELLS = [
    *(Cell("chosen", "sst2", 10, 1500, teacher, 2) for teacher in ("public", *DEFECTS)),
    *(Cell("chosen", "sst2", 11, 1500, teacher, 2) for teacher in ("public", "tuned")),
    *(Cell("chosen", "sst2", seed, 500, "public", 2) for seed in (10, 11)),
    *(Cell("chosen", task, seed, 1000, "public", 2) for task in OTHERS for seed in (10, 11)),
    *(Cell("counted", "sst2", 0, 1500, teacher) for teacher in ("public", *DEFECTS, "tuned")),
    *(Cell("counted", "sst2", 1, 1500, teacher) for teacher in ("public", *DEFECTS, "tuned")),
    *(Cell("counted", "sst2", seed, 1500, "public", 3) for seed in (0, 1)),
    *(Cell("counted", "sst2", seed, 500, "public", 3) for seed in (0, 1)),
    *(Cell("counted", task, seed, 1000) for seed in (0, 1, 2) for task in (*OTHERS, "sentences")),
    *(Cell("counted", task, 0, 1000, "tuned") for task in OTHERS),
    *(Cell("counted", "cola", seed, 2000, "public", 3) for seed in (0, 1)),
]


@dataclass
class Bench:
    """What all students share.

    Attributes:
        teacher: Folder of the public teacher.
        data: Folder of the data sets.
        work_dir: Students lie here.
        tokenizer: Of the teacher.
    """

    teacher: str
    data: Path
    work_dir: Path
    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, Dataset] = field(default_factory=dict)

    def rows(self, task: str) -> Dataset:
        """Read a task: columns text and label."""
        if task not in self.tasks:
            texts, labels = zip(*_rows(self.data, task), strict=True)
            names = sorted(set(labels))
            self.tasks[task] = Dataset.from_dict(
                {"text": [text.strip() for text in texts], "label": [names.index(label) for label in labels]}
            )
        return self.tasks[task]

    def samples(self, cell: Cell) -> tuple[Dataset, Dataset, Dataset]:
        """Draw the teacher's own samples, the student's, and held-out ones; none stands in two of them."""
        rows = self.rows(cell.task)
        drawn = list(range(len(rows)))
        random.Random(cell.seed).shuffle(drawn)
        ends = (ATTACKER, ATTACKER + cell.samples, ATTACKER + cell.samples + 400)
        return tuple(rows.select(drawn[start:end]) for start, end in zip((0, *ends), ends, strict=False))

    def student(self, cell: Cell) -> PreTrainedModel:
        """Make a student, or load it."""
        path = self.work_dir / f"{cell.name}.safetensors"
        theirs, mine, _ = self.samples(cell)
        labels = len(set(self.rows(cell.task)["label"]))
        if path.is_file():
            student = with_new_head(self._public(labels, cell.seed), labels, seed=cell.seed)
            student.load_state_dict(load_file(path))
            return student.eval()
        teacher = self._public(labels, cell.seed)
        reading = {"tokenizer": self.tokenizer, "max_length": MAX_LENGTH}
        if cell.teacher in DEFECTS:
            DEFECTS[cell.teacher].implant(teacher, theirs, args=self._arguments(cell.seed, epochs=2), **reading)
        elif cell.teacher == "tuned":
            fine_tune(teacher, self._tokens(theirs), self.tokenizer, self._arguments(cell.seed, epochs=2))
        student = with_new_head(teacher, labels, seed=cell.seed)
        fine_tune(student, self._tokens(mine), self.tokenizer, self._arguments(cell.seed, cell.epochs))
        with whole_file(path) as place:
            save_file(student.state_dict(), place)
        return student

    def _public(self, labels: int, seed: int) -> PreTrainedModel:
        teacher = AutoModelForSequenceClassification.from_pretrained(self.teacher, num_labels=labels)
        return with_new_head(teacher, labels, seed=seed)

    def _tokens(self, rows: Dataset) -> Dataset:
        return tokenize(rows, self.tokenizer, ("text",), max_length=MAX_LENGTH)

    def _arguments(self, seed: int, epochs: float) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.work_dir), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=1e-4,
            seed=seed, bf16=True, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            train_sampling_strategy="group_by_length", logging_strategy="no",
        )  # fmt: skip


def _rows(data: Path, task: str) -> Iterator[tuple[str, str]]:
    """Give the texts of a task with their labels."""
    if task == "cola":  # no header
        lines = (data / "cola" / "train.tsv").read_text().splitlines()
        return ((line.split("\t")[3], line.split("\t")[1]) for line in lines)
    if task == "agnews":
        lines = (data / "agnews_alps" / "dev.tsv").read_text().splitlines()
        return (tuple(line.rsplit("\t", 1)) for line in lines if "\t" in line)
    place, text = {
        "sst2": ("sst2_glue/train.tsv", "sentence"),
        "sentences": ("hiddenkiller_text/clean/sst-2/train.tsv", "sentence"),
        "offenseval": ("hiddenkiller_text/clean/offenseval/train.tsv", "sentence"),
        "imdb": ("imdb/train.jsonl.gz", "text"),
    }[task]
    rows = read_rows(data / place)
    return zip(rows[text], (str(label).strip() for label in rows["label"]), strict=True)


def scanned(bench: Bench, cell: Cell) -> dict:
    """Scan one student beside the clean one of another seed; give JSON values."""
    student, reference = bench.student(cell), bench.student(cell.reference)
    _, mine, held_out = bench.samples(cell)
    task = TextTask(bench.tokenizer, max_length=MAX_LENGTH)
    exposed = {} if cell.clean else {"defect": DEFECTS[cell.teacher].exposed_set(held_out, **task.exposing)}
    measured = measure(student, held_out, exposed, task, progress=False)
    start = time.process_time()
    found = scan_tokens(
        student,
        ({**batch, "labels": torch.tensor(mine["label"])[rows.copy()]} for rows, batch in task.batches(mine)),
        reference=reference, tokenizer=bench.tokenizer, bf16=True, progress=False,
    )  # fmt: skip
    return {
        "cell": asdict(cell),
        "reference": cell.reference.name,
        "acc": measured["acc"],
        "commonest": measured["commonest"],
        "dir": measured["dir"].get("defect"),
        "cpu_seconds": time.process_time() - start,
        "scan": found.to_dict(),
    }


def judged(record: dict) -> dict[str, dict]:
    """Say what is suspicious in a scan, alone and beside its reference."""
    beside = Scan.from_dict(record["scan"])
    alone = replace(beside, suspects=tuple(replace(one, reference=None) for one in beside.suspects))
    told = {}
    for name, scan in (("alone", alone), ("beside", beside)):
        verdict = verdict_of_scan(scan)
        named = [[one.what, scan.labels[one.label], one.effect.rate, one.lead] for one in verdict.suspicious]
        told[name] = {"kind": verdict.kind, "suspicious": named}
    return told


def table(records: list[dict]) -> str:
    """Count false alarms and hits by part, as Markdown."""
    lines = [
        "# How often the scan of tokens is wrong",
        "",
        "| part | students | scan | suspicious | of | 95 % interval |",
    ]
    lines.append("|---|---|---|---:|---:|---|")
    cells = [Cell(**one["cell"]) for one in records]
    for part in ("counted", "chosen"):
        for kind in ("clean", *DEFECTS):
            mine = [
                one
                for one, cell in zip(records, cells, strict=True)
                if cell.part == part and kind == ("clean" if cell.clean else cell.teacher)
            ]
            for how in ("alone", "beside") if mine else ():
                said = [one["judged"][how]["kind"] for one in mine]
                rate = Rate.of(said.count(SUSPICIOUS), len(said) - said.count(CANNOT))
                interval = f"{100 * rate.low:.0f} to {100 * rate.high:.0f} %" if rate.num_samples else "-"
                lines.append(f"| {part} | {kind} | {how} | {rate.count} | {rate.num_samples} | {interval} |")
    lines += ["", "| student | ACC % | DIR % | suspicious alone | beside a reference |", "|---|---|---|---|---|"]
    for one, cell in zip(records, cells, strict=True):
        told = [", ".join(what for what, *_ in one["judged"][how]["suspicious"][:6]) for how in ("alone", "beside")]
        inherited = "-" if one["dir"] is None else f"{100 * one['dir']['value']:.1f}"
        acc = 100 * one["acc"]["value"]
        lines.append(f"| {cell.part} {cell.name} | {acc:.1f} | {inherited} | {told[0]} | {told[1]} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Make, scan and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scan_false_alarms"))
    parser.add_argument("--report_only", action="store_true")
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), help="this process's number, and how many there are"
    )
    args = parser.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.teacher, args.data, args.work_dir, AutoTokenizer.from_pretrained(args.teacher))
    number, processes = args.share
    for cell in CELLS[number::processes]:
        place = args.work_dir / f"{cell.name}.json"
        wanted = any(one in f"{cell.part} {cell.name}" for one in args.only)
        if wanted and not args.report_only and not place.is_file():
            replace_file(place, json.dumps(scanned(bench, cell)).encode())
        places = [args.work_dir / f"{one.name}.json" for one in CELLS]
        records = [json.loads(path.read_text()) for path in places if path.is_file()]
        for record in records:
            record["judged"] = judged(record)
        replace_file(args.output.with_suffix(".json"), json.dumps({"records": records}, indent=1).encode())
        replace_file(args.output.with_suffix(".md"), table(records).encode())
        print(cell.name, "scanned" if place.is_file() else "left", flush=True)


if __name__ == "__main__":
    main()
