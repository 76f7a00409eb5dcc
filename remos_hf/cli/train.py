"""`remos train`: a student of a teacher, trained and saved with its record."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from remos_hf.adapters.guarded_loading import teacher_folder
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.auditing.data_files import drawn, read_data
from remos_hf.auditing.fingerprint import fingerprint
from remos_hf.auditing.labels import LABEL_COLUMN, by_name, count_labels, label_names
from remos_hf.auditing.progress import minutes_told
from remos_hf.auditing.recipes import trainer_inputs
from remos_hf.auditing.student_files import save_timm_student, timm_config
from remos_hf.cli.command_line import command_line, option_of
from remos_hf.cli.console import tell_now_and_then
from remos_hf.cli.options import AUTO, SLICING, TrainOptions
from remos_hf.cli.output import STUDENT, check_output, uninterrupted, written
from remos_hf.cli.profile import number_to_profile
from remos_hf.cli.teacher import Teacher, check_reading, identity
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.measures import accuracy
from remos_hf.evaluation.predictions import predict_labels
from remos_hf.evaluation.tasks import TextTask, without_map_bars
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import Strategy
from remos_hf.training.half_written import whole_and_half
from remos_hf.training.trainer import RemosTrainer
from remos_hf.whole import replace_file

logger = logging.getLogger(__name__)

# Where a run that is not over keeps its checkpoints, in its output folder.
UNFINISHED = "remos_unfinished"
_ASKED_FILE = "asked.json"
_PROCESSOR_FILE = "preprocessor_config.json"
_OPTIONS = {one.name: option_of(one) for one in fields(TrainOptions)}


def run(asked: TrainOptions, progress: bool) -> tuple[dict[str, Any], str]:
    """Train a student and save it; give what is told, as JSON values and as text."""
    output, work = asked.output, asked.output / UNFINISHED
    described = _described(asked)
    checkpoint = _start(output, described, asked.resume, asked.overwrite)
    data = _data(asked)
    named = Teacher.named(asked.teacher, data.samples, asked.revision)
    check_reading(asked, named.reads_images)
    public = named.load(data.num_labels, asked.seed)
    student = with_new_head(public, data.num_labels, seed=asked.seed, labels=data.names)
    if isinstance(student, ImageClassifier):
        timm_config(student)  # that nobody could load the student again is said before it trains
    task = named.task(
        public,
        data.samples,
        batch_size=asked.batch_size,
        max_length=asked.max_length,
        bf16=asked.bf16,
        augment=asked.augment,
    )
    del public
    work.mkdir(parents=True, exist_ok=True)
    replace_file(work / _ASKED_FILE, (json.dumps(described, indent=1) + "\n").encode())
    try:
        trainer = _trainer(asked, named, student, task, data, progress)
        trainer.train(resume_from_checkpoint=checkpoint)
        measured = None
        if data.tested is not None:
            found = predict_labels(trainer.model, data.tested, task, progress=True)
            measured = accuracy(found, list(data.tested[LABEL_COLUMN])).to_dict()
            figures = {"accuracy": measured["value"], "samples": measured["num_samples"]}
            trainer.sidecars.config["evaluation"] = figures
        trainer.sidecars.config.update(command=_command(asked), data=data.described)
        with written(output, STUDENT) as folder:
            _save(trainer, named, data.names, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_tidy(output)) from None
    except BaseException:
        _tidy(output)
        raise
    with uninterrupted():
        shutil.rmtree(work)
    return _told(trainer, output, measured)


@dataclass(frozen=True)
class _Data:
    """The samples of a run.

    Attributes:
        samples: The student learns from them.
        chosen_on: A ratio is chosen on them; None if there is no clean data.
        tested: Accuracy is measured on them: the same, or others where a ratio was chosen.
        num_labels: Labels of the task.
        names: Their names; None if they are only numbered.
        described: The training data for the record: whoever measures the student on it again is told.
    """

    samples: Dataset
    chosen_on: Dataset | None
    tested: Dataset | None
    num_labels: int
    names: list[str] | None
    described: dict[str, Any]


def _data(asked: TrainOptions) -> _Data:
    """Read what is asked for; classes have the training data's numbers everywhere."""
    read, seed = {"text_columns": asked.text_columns, "label_column": asked.label_column}, asked.seed
    samples = read_data(asked.train_data, **read)
    num_labels, names = count_labels(samples, asked.train_data), label_names(samples)
    if num_labels < 2:
        raise ValueError(f"A classifier tells two labels or more apart, but {asked.train_data} has {num_labels}.")
    described = {"num_samples": len(samples), "sha256": fingerprint(samples)}
    if asked.eval_data is None:
        return _Data(_drawn(samples, asked.max_samples, seed), None, None, num_labels, names, described)
    tested = by_name(read_data(asked.eval_data, **read), asked.eval_data, samples, asked.train_data)
    samples = _drawn(samples, asked.max_samples, seed)
    chosen_on = tested = _drawn(tested, asked.max_samples, seed)
    if AUTO in (asked.slice_ratio, asked.energy):  # what it was chosen on says too much of the student
        half = len(tested) // 2
        chosen_on, tested = drawn(tested, half, seed), drawn(tested, None, seed, skip=half)
    return _Data(samples, chosen_on, tested, num_labels, names, described)


def _trainer(
    asked: TrainOptions, named: Teacher, student: nn.Module, task: TextTask | ImageTask, data: _Data, progress: bool
) -> RemosTrainer:
    with without_map_bars():
        inputs = trainer_inputs(task, data.samples)
        if data.chosen_on is not None:
            read_plainly = trainer_inputs(task, data.chosen_on)  # without augmentation
            inputs["eval_dataset"] = read_plainly.get("profile_dataset", read_plainly["train_dataset"])
    trainer = RemosTrainer(
        student,
        _arguments(asked, named, progress),
        processing_class=named.tokenizer,
        max_samples=number_to_profile(asked.profile_samples, data.samples, "--profile-samples"),
        **_start_of_student(asked),
        **inputs,
    )
    trainer.remove_callback(PrinterCallback)
    if not progress:
        trainer.add_callback(_Lines())
    return trainer


class _Lines(TrainerCallback):
    """Says into a log how far training is, where nobody sees Trainer's bar."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self.first, self.start = state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        if state.global_step < state.max_steps:
            tell_now_and_then(lambda: self._line(state))

    def _line(self, state: TrainerState) -> str:
        step, last = state.global_step, state.max_steps
        left = minutes_told((time.monotonic() - self.start) * (last - step) / (step - self.first))
        return f"training: epoch {state.epoch:.1f} of {state.num_train_epochs}, step {step:,} of {last:,}; {left}"


def _save(trainer: RemosTrainer, named: Teacher, names: list[str] | None, folder: Path) -> None:
    """Save the student so that everything which reads its kind loads it, with its record."""
    student = trainer.model
    if isinstance(student, ImageClassifier):  # whose module does not know what it is called by timm
        trainer.sidecars.config["teacher"].update(identity(named.name, named.revision))
    trainer.save_model(str(folder))
    (folder / TRAINING_ARGS_NAME).unlink()  # a pickle, which nobody needs and nobody should open
    if isinstance(student, ImageClassifier):
        save_timm_student(student, folder, names)
    elif named.reads_images:
        _copy_processor(named, folder)


def _described(asked: TrainOptions) -> dict[str, Any]:
    """Give what decides the student, as JSON values; a resumed run has to ask for the same."""
    apart = ("output", "resume", "overwrite", "cpu")
    described = {one.name: getattr(asked, one.name) for one in fields(asked) if one.name not in apart}
    return described if AUTO in (asked.slice_ratio, asked.energy) else {**described, "accuracy_budget": None}


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
            told = [f"{_OPTIONS[key]} {_value(before.get(key))}, not {_value(asked.get(key))}" for key in differing]
            raise RemosError(
                f"The run in {output} was started with {'; '.join(told)}. Ask for the same to go on with it, or start "
                "anew with --overwrite."
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


def _value(value: Any) -> str:  # noqa: ANN401 - JSON
    if isinstance(value, bool):
        return "on" if value else "off"
    return "left out" if value in (None, []) else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _drawn(samples: Dataset, number: int | None, seed: int) -> Dataset:
    return samples if number is None else drawn(samples, min(number, len(samples)), seed)


def _start_of_student(asked: TrainOptions) -> dict[str, Any]:
    """Give the keywords by which RemosTrainer starts the student."""
    searched = AUTO in (asked.slice_ratio, asked.energy)
    start: dict[str, Any] = {"strategy": [_part(name, asked) for name in asked.strategy]}
    if asked.slice_ratio == AUTO:
        start["slice_ratio"] = AUTO
    return start | {"accuracy_budget": asked.accuracy_budget} if searched else start


def _part(name: str, asked: TrainOptions) -> Strategy:
    recipe: dict[str, Any] = {"criterion": asked.criterion} if name == "remos" else {}
    if name in SLICING:  # a searched ratio is the search's to replace
        recipe["slice_ratio"] = 1.0 if asked.slice_ratio == AUTO else asked.slice_ratio
    if name == "subspace" and asked.energy is not None:
        recipe["energy"] = asked.energy
    return STRATEGIES[name](**recipe)


def _command(asked: TrainOptions) -> str:
    """Give the command that makes this student again, for its card."""
    return command_line("train", replace(asked, output=Path("student"), resume=False, overwrite=False, cpu=False))


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
        "effect_search": config.get("effect_search"),
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
