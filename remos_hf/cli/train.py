"""`remos train`: a student of a teacher, trained and saved with its record."""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from remos_hf.adapters.guarded_loading import TIMM, teacher_folder
from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.data_files import drawn, read_data
from remos_hf.auditing.labels import LABEL_COLUMN, by_name, count_labels, label_names
from remos_hf.auditing.recipes import trainer_inputs
from remos_hf.cli.options import AUTO, TrainOptions
from remos_hf.cli.output import STUDENT, check_output, uninterrupted, written
from remos_hf.cli.profile import number_to_profile
from remos_hf.cli.teacher import Teacher
from remos_hf.errors import CorruptFileError, RemosError, UnsupportedModelError
from remos_hf.evaluation.measures import accuracy
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.tasks import without_map_bars
from remos_hf.strategies import STRATEGIES
from remos_hf.training.half_written import whole_and_half
from remos_hf.training.trainer import RemosTrainer
from remos_hf.whole import replace_file

logger = logging.getLogger(__name__)

# Where a run that is not over keeps its checkpoints, in its output folder.
UNFINISHED = "remos_unfinished"
_ASKED_FILE = "asked.json"
_PROCESSOR_FILE = "preprocessor_config.json"


def run(asked: TrainOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Train a student and save it; give what is told, as JSON values and as text."""
    output, seed, work = asked.output, asked.seed, asked.output / UNFINISHED
    described = _described(asked)
    checkpoint = _start(output, described, asked.resume, asked.overwrite)
    if asked.teacher.startswith(TIMM):
        raise UnsupportedModelError(
            f"{asked.teacher} is a model of timm, whose students other tools load by timm's own recipe: see "
            "examples/run_timm_remos.py. `remos audit` takes it."
        )
    samples, tested = _read(asked)
    num_labels, names = count_labels(samples, asked.train_data), label_names(samples)
    if num_labels < 2:
        raise ValueError(f"A classifier tells two labels or more apart, but {asked.train_data} has {num_labels}.")
    samples = _drawn(samples, asked.max_samples, seed)
    chosen_on = tested = None if tested is None else _drawn(tested, asked.max_samples, seed)
    if asked.slice_ratio == AUTO:  # what the ratio was chosen on says too much of the student
        half = len(tested) // 2
        chosen_on, tested = drawn(tested, half, seed), drawn(tested, None, seed, skip=half)
    named = Teacher.named(asked.teacher, samples, asked.revision)
    public = named.load(num_labels, seed)
    student = with_new_head(public, num_labels, seed=seed)
    if names is not None:
        student.config.id2label = dict(enumerate(names))
        student.config.label2id = {name: number for number, name in enumerate(names)}
    task = named.task(
        public,
        samples,
        batch_size=asked.batch_size,
        max_length=asked.max_length,
        bf16=asked.bf16,
        augment=asked.augment,
    )
    del public
    work.mkdir(parents=True, exist_ok=True)
    replace_file(work / _ASKED_FILE, (json.dumps(described, indent=1) + "\n").encode())
    try:
        with without_map_bars():
            inputs = trainer_inputs(task, samples)
            if tested is not None:
                read_plainly = trainer_inputs(task, chosen_on)  # without augmentation
                inputs["eval_dataset"] = read_plainly.get("profile_dataset", read_plainly["train_dataset"])
        trainer = RemosTrainer(
            student,
            _arguments(asked, named, progress),
            processing_class=named.tokenizer,
            max_samples=number_to_profile(asked.profile_samples, samples, "--profile-samples"),
            **_start_of_student(asked),
            **inputs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        measured = None
        if tested is not None:
            found = predict_labels(trainer.model, tested, task, progress=progress)
            measured = accuracy(found, list(tested[LABEL_COLUMN])).to_dict()
        trainer.sidecars.config["command"] = _command(described)
        with written(output, STUDENT) as folder:
            trainer.save_model(str(folder))
            (folder / TRAINING_ARGS_NAME).unlink()  # a pickle, which nobody needs and nobody should open
            if named.reads_images:
                _copy_processor(named, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_tidy(output)) from None
    except BaseException:
        _tidy(output)
        raise
    with uninterrupted():
        shutil.rmtree(work)
    return _told(trainer, output, measured)


def _described(asked: TrainOptions) -> dict[str, Any]:
    """Give what decides the student, as JSON values; a resumed run has to ask for the same."""
    apart = ("output", "resume", "overwrite", "cpu")
    described = {one.name: getattr(asked, one.name) for one in fields(asked) if one.name not in apart}
    return described if asked.slice_ratio == AUTO else {**described, "accuracy_budget": None}


def _arguments(asked: TrainOptions, teacher: Teacher, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(asked.output / UNFINISHED),
        learning_rate=asked.learning_rate,
        num_train_epochs=asked.epochs,
        per_device_train_batch_size=asked.batch_size,
        per_device_eval_batch_size=asked.batch_size,
        seed=asked.seed,
        bf16=asked.bf16,
        use_cpu=asked.cpu or not torch.cuda.is_available(),
        remove_unused_columns=not teacher.reads_images,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=0.05,
        report_to="none",
        disable_tqdm=not progress,
    )


def _start(output: Path, asked: Mapping[str, Any], resume: bool, overwrite: bool) -> str | None:
    """Look at the output folder; give the checkpoint to go on from, if there is one."""
    work = output / UNFINISHED
    path = work / _ASKED_FILE
    if path.is_file() and resume:
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise CorruptFileError(f"{path} does not say what was asked for ({error}). Use --overwrite.") from error
        differing = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
        if differing:
            raise RemosError(
                f"{work} was asked for otherwise ({', '.join(differing)} differ). Ask for the same, or "
                "start anew with --overwrite."
            )
        found = _last_whole(work)
        if found is None:
            logger.warning("--resume: %s holds no checkpoint yet, so training starts anew.", output)
        return None if found is None else str(found)
    if path.is_file() and not overwrite:
        raise FileExistsError(
            f"{output} holds a run that is not over. Go on with it by --resume, or start anew with --overwrite."
        )
    if resume:
        logger.warning("--resume: %s holds no run to go on with, so training starts anew.", output)
    check_output(output, STUDENT, overwrite, besides=UNFINISHED if path.is_file() else None)
    if path.is_file():
        shutil.rmtree(work)
    return None


def _last_whole(work: Path) -> Path | None:
    """Give the last checkpoint; those that a killed run left half written are removed."""
    whole, halves = whole_and_half(work)
    for half in halves:
        shutil.rmtree(half, ignore_errors=True)
    return whole


def _tidy(output: Path) -> str:
    """Leave whole checkpoints, or nothing; say which."""
    with uninterrupted():
        work = output / UNFINISHED
        found = _last_whole(work)
        if found is not None:
            return f"{found} is kept: the same command with --resume goes on from there."
        shutil.rmtree(work, ignore_errors=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    return "Nothing is kept: the first checkpoint comes after an epoch."


def _read(asked: TrainOptions) -> tuple[Dataset, Dataset | None]:
    """Read both sources; classes have the training data's numbers in both."""
    read = {"text_columns": asked.text_columns, "label_column": asked.label_column}
    samples = read_data(asked.train_data, **read)
    if asked.eval_data is None:
        return samples, None
    return samples, by_name(read_data(asked.eval_data, **read), asked.eval_data, samples, asked.train_data)


def _drawn(samples: Dataset, number: int | None, seed: int) -> Dataset:
    return samples if number is None else drawn(samples, min(number, len(samples)), seed)


def _start_of_student(asked: TrainOptions) -> dict[str, Any]:
    """Give the keywords by which RemosTrainer starts the student."""
    if asked.slice_ratio == AUTO:
        return {"slice_ratio": AUTO, "accuracy_budget": asked.accuracy_budget}
    ratio = {} if asked.slice_ratio is None else {"slice_ratio": asked.slice_ratio}
    return {"strategy": STRATEGIES[asked.strategy](**ratio)}


def _command(asked: Mapping[str, Any]) -> str:
    """Give the command that makes this student again, for its card. Local paths are their names: others have others."""
    parts = ["remos", "train", _public(asked["teacher"])]
    for name, value in asked.items():
        if name == "teacher" or value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        shown = [_public(one) if name.endswith("_data") else str(one) for one in values]
        parts += [f"--{name.removesuffix('s') if name == 'text_columns' else name}".replace("_", "-"), *shown]
    return shlex.join([*parts, "--output", "student"])


def _public(source: str) -> str:
    return Path(source).name if Path(source).exists() else source


def _copy_processor(teacher: Teacher, folder: Path) -> None:
    # Read as it is: loading it would run the image processor's class, and needs torchvision.
    found = teacher_folder(teacher.name, revision=teacher.revision).path / _PROCESSOR_FILE
    if found.is_file():
        shutil.copyfile(found, folder / _PROCESSOR_FILE)


def _told(trainer: RemosTrainer, output: Path, measured: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    config = trainer.sidecars.config
    told = {
        "student": str(output),
        "strategy": config["strategy"],
        "teacher": config["teacher"],
        "slice": config.get("slice"),
        "coverage": config.get("coverage"),
        "ratio_search": config.get("ratio_search"),
        "steps": trainer.state.global_step,
        "accuracy": measured,
        "files": sorted(path.name for path in output.iterdir()),
    }
    lines = [f"Trained {trainer.state.global_step} steps."]
    if told["slice"]:
        held = told["slice"]
        lines.append(f"Kept {held['num_kept']:,} of {held['num_weights']:,} weights ({held['share_kept']:.2%}).")
    if measured:
        low, high = (100 * measured[end] for end in ("low", "high"))
        lines.append(
            f"Accuracy {100 * measured['value']:.1f} % on {measured['num_samples']:,} samples "
            f"(95 % interval {low:.1f} to {high:.1f})."
        )
    lines.append(f"Saved {output}: an ordinary checkpoint, with the record of how it was made.")
    return told, "\n".join(lines)
