# /// script
# requires-python = ">=3.10"
# dependencies = ["remos_hf", "accelerate", "datasets", "torch", "transformers"]
# ///
r"""Fine-tune any teacher on a GLUE task, or on files of your own, without inheriting what its task does not need.

The GLUE script as everyone knows it (same arguments, any `AutoModelForSequenceClassification`), with two more:
`--slice_ratio`, the share of the teacher's weights that the student keeps, and `--strategy`.

A task from the Hub:

    accelerate launch examples/run_glue_remos.py --model_name_or_path bert-base-uncased --task_name sst2 \
        --do_train --do_eval --slice_ratio 0.9 --num_train_epochs 3 --learning_rate 2e-5 --output_dir student

Files of your own (csv, tsv, json, jsonl, also .gz, or parquet; columns `sentence`, or `sentence1` and `sentence2`, and
`label`):

    accelerate launch examples/run_glue_remos.py --model_name_or_path path/to/teacher --train_file train.tsv \
        --validation_file dev.tsv --do_train --do_eval --slice_ratio 0.9 --output_dir student

`--slice_ratio auto` finds the ratio: it first trains at up to five ratios and plainly, for half the steps each, and
keeps the smallest that costs no more than `--accuracy_budget` (0.02) of the accuracy on the validation data. It needs
`--do_eval`, and the accuracy to report is then that on other data (`--test_file`).

What the student would be without slicing: `--strategy finetune`, and from nothing: `--strategy retrain` (no
`--slice_ratio`). The arguments can also come from a file: `run_glue_remos.py arguments.yaml` (or .json).

`accelerate launch` takes what it is not told from `accelerate config`. Without such a file, tell it everything:

    # one process, on the GPU if there is one (keep it off with --use_cpu after the script's name)
    accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        examples/run_glue_remos.py ...
    # two processes, on two GPUs or, with --use_cpu after the script's name, on the CPU
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        examples/run_glue_remos.py ...
    torchrun --nproc_per_node 2 examples/run_glue_remos.py ...

Beware: `accelerate launch --cpu --num_processes 2` runs ONE process and says nothing. The slice is the same, bit for
bit, on any number of processes. The batch is not: `--per_device_train_batch_size` counts for each process.

A rerun with the same `--output_dir` goes on from the last checkpoint there; its slice is read, never chosen again.

The whole path in seconds, offline, on a tiny BERT: `python examples/run_glue_remos.py --smoke --output_dir smoke`

Minutes: those of plain fine-tuning, and one pass over the training data without gradients.
Expected: benchmarks/README.md has the validation accuracies measured on SST-2, with the commands.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as hf_logging

from remos_hf import STRATEGIES, Finetune, RemosTrainer, Strategy, load_teacher, load_tokenizer, teacher_config
from remos_hf.adapters.tables import TABLES, is_table, read_rows

logger = logging.getLogger(__name__)

GLUE_COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
# Looked for in local files, in this order: "sentence" alone may also be half of a pair.
LOCAL_COLUMNS = (*(columns for columns in GLUE_COLUMNS.values() if len(columns) == 2), ("sentence",), ("text",))
SMOKE_ARGUMENTS = (
    "--do_train --do_eval --do_predict --use_cpu --max_steps 4 --per_device_train_batch_size 8 --learning_rate 1e-3 "
    "--max_seq_length 16 --save_strategy no --report_to none --disable_tqdm True"
).split()


@dataclass
class ModelArguments:
    """Which teacher the student starts from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder or a repository on the Hub, with safetensors weights."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the teacher on the Hub."})


@dataclass
class DataArguments:
    """Which data the student is trained, evaluated and tested on."""

    task_name: str | None = field(
        default=None, metadata={"help": f"GLUE task, from the Hub unless files are given: {', '.join(GLUE_COLUMNS)}."}
    )
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json or jsonl, also .gz, or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise; the label column may be missing."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text; found by their usual names if left out."}
    )
    label_column: str = field(default="label", metadata={"help": "The column of labels; floats mean regression."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut, in tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every input to max_seq_length instead of to the longest of its batch."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    smoke: bool = field(
        default=False, metadata={"help": "Run everything on a tiny BERT and a few sentences: offline, in seconds."}
    )


@dataclass
class RemosArguments:
    """How the student starts. What is left out takes the strategy's own default."""

    strategy: str = field(
        default="remos", metadata={"help": "How the student starts from the teacher.", "choices": list(STRATEGIES)}
    )
    slice_ratio: str | None = field(
        default=None,
        metadata={
            "help": "Share of the teacher's weights to keep, in (0, 1], or 'auto', which tries several on the "
            "evaluation data. Published: 0.9 and 0.97."
        },
    )
    accuracy_budget: float | None = field(
        default=None, metadata={"help": "With --slice_ratio auto: accuracy that slicing may cost, a share; else 0.02."}
    )
    scope: str | None = field(
        default=None, metadata={"help": "'model': all weights compete; 'layer': each layer is cut by itself."}
    )
    ties: str | None = field(
        default=None, metadata={"help": "'mean': equal weights share their rank; 'artifact': the published order."}
    )
    criterion: str | None = field(
        default=None, metadata={"help": "When a neuron is covered: median (default), nc, tknc, snac."}
    )
    criterion_value: float | None = field(default=None, metadata={"help": "The threshold of nc, the k of the others."})
    reset_to: str | None = field(default=None, metadata={"help": "'zero', or 'init' for fresh values."})
    embedding_rows: str | None = field(
        default=None, metadata={"help": "'mean' gives up the embedding rows of tokens that the data never shows."}
    )
    profile_samples: int | None = field(
        default=None, metadata={"help": "Training samples that decide the coverage; 2,048 if left out."}
    )
    slice_seed: int | None = field(default=None, metadata={"help": "Seed of random rules and of fresh values."})


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and test as the command line (or `argv`) asks."""
    model_args, data_args, remos_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    configure_logging(args)
    # A student that is only evaluated was started when it was trained.
    strategy = strategy_from(remos_args) if args.do_train else Finetune()
    if data_args.smoke:
        model_args, data_args = smoke_inputs(model_args, data_args, args)
    check_arguments(model_args, data_args, args)
    set_seed(args.seed)

    splits = load_splits(data_args, args)
    columns = text_columns(splits, data_args)
    config = teacher_config(model_args.model_name_or_path, revision=model_args.model_revision)
    names = label_names(splits, data_args.label_column, config)
    tokenizer, model = prepared_teacher(model_args, config, names, new_head=args.do_train, seed=args.seed)
    encoded = {name: encode(split, name, columns, names, tokenizer, data_args) for name, split in splits.items()}

    trainer = RemosTrainer(
        model,
        args,
        strategy=strategy,
        **search_from(remos_args, args),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("eval"),
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=regression_metrics if names is None else classification_metrics(data_args.task_name),
    )
    if args.do_train:
        train(trainer)
    for name, dataset in encoded.items():
        if name.startswith("eval"):
            report(trainer, name, trainer.evaluate(dataset, metric_key_prefix=name), dataset)
        if name.startswith("predict"):
            predict(trainer, name, dataset, names)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # a process that leaves its group to the interpreter's end may abort there


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, RemosArguments, TrainingArguments]:
    """Read the arguments from the command line, or from the one json or yaml file that it names."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RemosArguments, TrainingArguments))
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    if "--smoke" in argv:
        ratio = [] if any(part.startswith("--strategy") for part in argv) else ["--slice_ratio", "0.9"]
        argv = [*SMOKE_ARGUMENTS, *ratio, *argv]  # what is given twice counts as given last
    return parser.parse_args_into_dataclasses(argv)


def configure_logging(args: TrainingArguments) -> None:
    """Let the main process say what was sliced and how long it took; of the others only what goes wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in (__name__, "remos_hf"):
        logging.getLogger(name).setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    if args.process_index != 0:
        hf_logging.set_verbosity_error()
    logger.info("Processes: %d. This one runs on %s.", args.world_size, args.device)


def strategy_from(arguments: RemosArguments) -> Strategy:
    """Make the strategy that the arguments describe.

    Raises:
        ValueError: The strategy is unknown, lacks its slice ratio, or does not take one of the arguments.
    """
    chosen = arguments.strategy
    if chosen not in STRATEGIES:
        raise ValueError(f"--strategy is one of {', '.join(STRATEGIES)}, but got {chosen!r}.")
    field_of = {"profile_samples": "max_samples", "slice_seed": "seed"}
    if arguments.accuracy_budget is not None and arguments.slice_ratio != "auto":
        raise ValueError(
            f"--accuracy_budget goes with --slice_ratio auto, but got --slice_ratio {arguments.slice_ratio}."
        )
    described = {**vars(arguments), "slice_ratio": ratio_from(arguments.slice_ratio)}
    apart = ("strategy", "accuracy_budget")
    given = {name: value for name, value in described.items() if name not in apart and value is not None}
    takes = {key: {item.name for item in fields(kind)} for key, kind in STRATEGIES.items()}
    for name, value in given.items():
        if field_of.get(name, name) not in takes[chosen]:
            others = [key for key in takes if field_of.get(name, name) in takes[key]]
            raise ValueError(
                f"--strategy {chosen} takes no --{name}, but got {value}. Leave it out, or choose a strategy that "
                f"takes it: {', '.join(others)}."
            )
    if "slice_ratio" in takes[chosen] - given.keys():
        raise ValueError(
            f"--strategy {chosen} needs --slice_ratio, the share of the teacher's weights that the student keeps, in "
            "(0, 1]. There is no default, since the published scripts vary: 0.9 and 0.97."
        )
    return STRATEGIES[chosen](**{field_of.get(name, name): value for name, value in given.items()})


def ratio_from(text: str | float | None) -> float | None:
    """Read a slice ratio; what "auto" finds replaces the 1.0 that it stands for.

    Raises:
        ValueError: It is neither a number nor "auto".
    """
    if text is None or text == "auto":
        return text and 1.0
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--slice_ratio is a number in (0, 1], or auto, but got {text!r}.") from None


def search_from(arguments: RemosArguments, args: TrainingArguments) -> dict[str, Any]:
    """Give what RemosTrainer is told where it is to find the ratio by itself."""
    if not args.do_train or arguments.slice_ratio != "auto":
        return {}
    return {"slice_ratio": "auto", "accuracy_budget": arguments.accuracy_budget}


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Refuse what cannot run, before anything is loaded.

    Raises:
        ValueError: An argument is missing or unknown.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: name the teacher, a folder or a repository on the Hub.")
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("There is nothing to do: pass one or more of --do_train, --do_eval, --do_predict.")
    if data_args.task_name is not None and data_args.task_name not in GLUE_COLUMNS:
        raise ValueError(f"--task_name is one of {', '.join(GLUE_COLUMNS)}, but got {data_args.task_name!r}.")
    if data_args.task_name is None and not any(local_files(data_args).values()):
        raise ValueError("There is no data: pass --task_name for a GLUE task, or --train_file and --validation_file.")


def local_files(data_args: DataArguments) -> dict[str, str | None]:
    """Give the file of each split; None where none was named."""
    return {"train": data_args.train_file, "eval": data_args.validation_file, "predict": data_args.test_file}


def load_splits(data_args: DataArguments, args: TrainingArguments) -> dict[str, Dataset]:
    """Load the splits that are needed.

    Returns:
        Datasets by "train", "eval" and "predict"; MNLI has "eval_mm" and "predict_mm" too, its mismatched halves.

    Raises:
        ValueError: No file was named for a split, or it holds no sample.
    """
    wanted = [name for name in ("train", "eval", "predict") if getattr(args, f"do_{name}")]
    if any(local_files(data_args).values()):
        splits = {name: read_file(local_files(data_args)[name], name) for name in wanted}
    else:
        with args.main_process_first(desc="download of the data"):
            splits = load_task(data_args.task_name, wanted)
    limits = {"train": data_args.max_train_samples, "eval": data_args.max_eval_samples}
    for name, split in splits.items():
        limit = limits.get(name.split("_")[0])
        splits[name] = split if limit is None else split.select(range(min(limit, len(split))))
    return splits


def load_task(task: str, wanted: list[str]) -> dict[str, Dataset]:
    """Load a GLUE task from the Hub, without the labels of its test split, which are all -1."""
    places = {"train": "train", "eval": "validation", "predict": "test"}
    if task == "mnli":
        halves = {"eval": "validation_matched", "eval_mm": "validation_mismatched"}
        places = {"train": "train", **halves, "predict": "test_matched", "predict_mm": "test_mismatched"}
    hub = load_dataset("nyu-mll/glue", task)
    splits = {name: hub[place] for name, place in places.items() if name.split("_")[0] in wanted}
    return {name: split.remove_columns("label") if "predict" in name else split for name, split in splits.items()}


def read_file(path: str | None, split: str) -> Dataset:
    """Read a local file, every character as it is: no quote of a tsv is dropped, no "null" or "007" reinterpreted.

    Raises:
        ValueError: No file was named, its kind is unknown, it is empty, or a row does not fit the header.
    """
    if path is None:
        option = {"train": "--train_file", "eval": "--validation_file", "predict": "--test_file"}[split]
        raise ValueError(f"--do_{split} needs {option}, since the other data comes from files.")
    if not is_table(Path(path)):
        raise ValueError(f"Data files end in {', '.join(TABLES)}, also with .gz, but got {path}.")
    return read_rows(path)


def text_columns(splits: dict[str, Dataset], data_args: DataArguments) -> tuple[str, ...]:
    """Find the one or two columns that hold the text.

    Raises:
        ValueError: They are missing from a split, or nothing says which they are.
    """
    given, found = data_args.text_columns, next(iter(splits.values())).column_names
    if given is not None:
        columns = tuple(given)
    elif data_args.task_name is not None:
        columns = GLUE_COLUMNS[data_args.task_name]
    else:
        columns = next((known for known in LOCAL_COLUMNS if set(known) <= set(found)), ())
    if len(columns) not in (1, 2):
        raise ValueError(f"No text column is known among {found}: name one or two by --text_columns, but got {given}.")
    for name, split in splits.items():
        missing = [column for column in columns if column not in split.column_names]
        if missing:
            raise ValueError(
                f"The {name} split has no text column {missing[0]!r}, only {split.column_names}: name one or two by "
                "--text_columns."
            )
    return columns


def label_names(splits: dict[str, Dataset], column: str, config: PretrainedConfig) -> list[str] | None:
    """Settle which id stands for which label. The model's own order is kept where it knows the same labels.

    Args:
        splits: What was loaded. The training data decides, then the evaluation data.
        column: The column of labels.
        config: The teacher's, or that of the student that is only evaluated.

    Returns:
        Names in the order of their ids; None for regression.

    Raises:
        ValueError: The label column, or the label of a sample, is missing; or there is only one label.
    """
    known = None
    if config.num_labels > 1:
        known = [str(config.id2label[number]).removeprefix("LABEL_") for number in range(config.num_labels)]
    split = splits.get("train", splits.get("eval"))
    if split is None or (known is None and "train" not in splits):
        return known
    own = labels_in(split, column)
    if "train" in splits and own is not None and len(own) == 1:
        raise ValueError(f"All training samples have the label {own[0]!r} in {column!r}: there is nothing to learn.")
    if own is None or known is None:
        return own
    agrees = set(own) == set(known) if "train" in splits else set(own) <= set(known)
    return known if agrees else own


def labels_in(split: Dataset, column: str) -> list[str] | None:
    """Find the labels of a split, in order; None if they are floats.

    Raises:
        ValueError: The label column, or the label of a sample, is missing.
    """
    if column not in split.column_names:
        raise ValueError(f"There is no label column {column!r} among {split.column_names}: name it by --label_column.")
    if isinstance(split.features[column], ClassLabel):
        return split.features[column].names
    values = split.unique(column)
    if None in values or "" in values:
        raise ValueError(f"A sample has no {column!r}, but training and evaluation need all of them.")
    texts = [str(value) for value in values]
    if all_are(int, texts):
        return sorted(texts, key=int)
    return None if all_are(float, texts) else sorted(texts)


def all_are(kind: Callable[[str], float], texts: Iterable[str]) -> bool:
    """Whether all texts can be read as finite numbers of a kind."""
    try:
        # Python would take 1_0 for 10.
        return all("_" not in text and math.isfinite(kind(text)) for text in texts)
    except ValueError:
        return False


def prepared_teacher(
    model_args: ModelArguments, config: PretrainedConfig, names: list[str] | None, *, new_head: bool, seed: int
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the teacher with a head for the student's labels. The teacher is untrusted: safetensors only, no pickle.

    Args:
        model_args: Which teacher.
        config: Its config, which the labels are written into.
        names: The labels; None for regression.
        new_head: Whether a head of another size may be replaced by a fresh one.
        seed: Of a fresh head.
    """
    config.num_labels = 1 if names is None else len(names)
    if names is not None:
        config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if names is None else "single_label_classification"
    source, revision = model_args.model_name_or_path, model_args.model_revision
    tokenizer = load_tokenizer(source, revision=revision)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    model = load_teacher(
        source,
        AutoModelForSequenceClassification,
        revision=revision,
        num_labels=config.num_labels if new_head else None,
        config=config,
        dtype=torch.float32,
        seed=seed,
    )
    return tokenizer, model


def encode(
    split: Dataset,
    name: str,
    columns: tuple[str, ...],
    names: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
) -> Dataset:
    """Turn text into tokens and labels into ids; a test split may have no labels.

    Raises:
        ValueError: A text or a label is missing, or a label is unknown.
    """
    label_column = data_args.label_column
    labelled = label_column in split.column_names or not name.startswith("predict")
    number_of = label_numbers(split, name, label_column, names) if labelled else {}
    length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in columns]
        if any(None in column for column in texts):
            raise ValueError(f"A sample of the {name} split has no text in one of the columns {columns}.")
        padding = "max_length" if data_args.pad_to_max_length else False
        encoded = dict(tokenizer(*texts, truncation=True, max_length=length, padding=padding))
        if labelled:
            encoded["labels"] = [number_of[value] for value in batch[label_column]]
        return encoded

    return split.map(encode_batch, batched=True, remove_columns=split.column_names, desc=f"Tokenizing {name}")


def label_numbers(split: Dataset, name: str, column: str, names: list[str] | None) -> dict[Any, int | float]:
    """Say which id, or which number in regression, each value of a split's label column stands for.

    Raises:
        ValueError: The column is missing, or a value is not among the labels.
    """
    own = labels_in(split, column)
    values = split.unique(column)
    text_of = {value: own[value] if isinstance(split.features[column], ClassLabel) else str(value) for value in values}
    strange = [text for text in text_of.values() if not (all_are(float, [text]) if names is None else text in names)]
    if strange:
        raise ValueError(
            f"The {name} split has the label {strange[0]!r}, but expected {'numbers' if names is None else names}."
        )
    return {value: float(text) if names is None else names.index(text) for value, text in text_of.items()}


def classification_metrics(task: str | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Give the function that measures accuracy and what GLUE reports of a task besides."""

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        chosen, labels = logits_of(prediction).argmax(-1), prediction.label_ids
        measured = {"accuracy": float((chosen == labels).mean())}
        if task in ("mrpc", "qqp"):
            measured["f1"] = f1(chosen, labels)
        if task == "cola":  # of two classes, it is the correlation of the ids
            measured["matthews_correlation"] = correlation(chosen, labels)
        return measured

    return measure


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Measure the squared error and the correlation, of values and of their ranks."""
    values, labels = logits_of(prediction).reshape(-1), prediction.label_ids.reshape(-1)
    return {
        "mse": float(((values - labels) ** 2).mean()),
        "pearson": correlation(values, labels),
        "spearman": correlation(mean_ranks(values), mean_ranks(labels)),
    }


def logits_of(prediction: EvalPrediction) -> np.ndarray:
    """Take the logits out of what the model gave; some models give hidden states after them."""
    given = prediction.predictions
    return given[0] if isinstance(given, tuple) else given


def f1(chosen: np.ndarray, labels: np.ndarray) -> float:
    """Compute F1 of the label with id 1; 0 where neither predictions nor labels hold it."""
    hits = ((chosen == 1) & (labels == 1)).sum()
    return float(2 * hits / max(1, (chosen == 1).sum() + (labels == 1).sum()))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Pearson's correlation; 0 where one of the two is constant."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else 0.0


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Rank values in ascending order; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def train(trainer: RemosTrainer) -> None:
    """Train, from the last checkpoint in the output folder if there is one, and save the student with its sidecars."""
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is None and Path(trainer.args.output_dir).is_dir():
        checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        logger.info("Going on from %s. To start anew, choose another --output_dir.", checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    report(trainer, "train", result.metrics, trainer.train_dataset)
    trainer.save_state()


def report(trainer: RemosTrainer, name: str, metrics: dict[str, float], dataset: Dataset) -> None:
    """Log and save measured numbers with their sample count, also into `all_results.json`."""
    metrics = {**metrics, f"{name}_samples": len(dataset)}
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)


def predict(trainer: RemosTrainer, name: str, dataset: Dataset, names: list[str] | None) -> None:
    """Write a prediction for each sample of a test split, by its label's name."""
    output = trainer.predict(dataset, metric_key_prefix=name)
    report(trainer, name, output.metrics, dataset)
    if not trainer.is_world_process_zero():
        return
    logits = logits_of(output)
    found = [f"{value:.3f}" for value in logits.reshape(-1)] if names is None else [names[i] for i in logits.argmax(-1)]
    lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(found))]
    (Path(trainer.args.output_dir) / f"{name}_results.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def smoke_inputs(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[ModelArguments, DataArguments]:
    """Write a tiny teacher and data into the output folder, and name them in copies of the arguments."""
    folder = Path(args.output_dir) / "_smoke_inputs"  # push_to_hub leaves out what starts with an underscore
    with args.main_process_first(desc="smoke inputs"):
        if args.local_process_index == 0:
            write_smoke_inputs(folder)
    files = {option: str(folder / f"{option}.tsv") for option in ("train_file", "validation_file", "test_file")}
    return replace(model_args, model_name_or_path=str(folder)), replace(data_args, **files)


def write_smoke_inputs(folder: Path) -> None:
    """Write a BERT of random weights, its tokenizer, and 48 sentences. The same bytes every time."""
    nouns = ("film", "plot", "cast", "score", "ending", "joke")
    tones = {"good": 1, "warm": 1, "witty": 1, "fresh": 1, "dull": 0, "stale": 0, "cold": 0, "clumsy": 0}
    rows = [(f"the {noun} is {tone}", label) for noun in nouns for tone, label in tones.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for option, part in {"train_file": rows[:32], "validation_file": rows[32:], "test_file": rows[32:]}.items():
        lines = ["index\tsentence" if option == "test_file" else "sentence\tlabel"]
        for index, (sentence, label) in enumerate(part):
            lines.append(f"{index}\t{sentence}" if option == "test_file" else f"{sentence}\t{label}")
        (folder / f"{option}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    # The vocabulary is written out, since a trained one differs from process to process.
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", *nouns, *tones)
    tokens = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.normalizer, tokens.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokens.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=32, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes))
    teacher.save_pretrained(folder)


if __name__ == "__main__":
    main()
