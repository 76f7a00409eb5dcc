"""Checkpoints of `fit`: how far a run has come, written whole or not at all, and found again."""

import copy
import json
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import load as load_tensors
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from remos_hf.errors import CorruptFileError
from remos_hf.training.moments import Moments
from remos_hf.training.windows import TrainingData
from remos_hf.whole import beside, remove_folder, replace_file, settle, whole_file, whole_folder

MODEL_FILE = "model.safetensors"
PROGRESS_FILE = "fit_progress.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside the states of its parts."""

    epoch: int = 0
    taken: int = 0  # steps of this epoch
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path, data: TrainingData) -> None:
        """Write it, with what a resumed run must not change."""
        content = {"format_version": 1, "settings": data.settings(), "progress": vars(self)}
        replace_file(folder / PROGRESS_FILE, (json.dumps(content) + "\n").encode())

    @staticmethod
    def check_settings(checkpoint: Path, data: TrainingData) -> None:
        """Refuse to go on with other batches: the rest of the epoch would repeat samples and leave others out."""
        asked = data.settings()
        found = _read(checkpoint)["settings"]
        other = {name: (found.get(name), value) for name, value in asked.items() if found.get(name) != value}
        if other:
            told = ", ".join(f"{name} was {before} and is {now}" for name, (before, now) in other.items())
            raise ValueError(f"{checkpoint} cannot be resumed: {told}. Resume with the same settings, or start anew.")

    @classmethod
    def load(cls, checkpoint: Path, accelerator: Accelerator) -> "Progress":
        """Put the parts back as they were, and give how far they had come."""
        # Accelerate passes over random states that it cannot read, and the run would go on with other dropout.
        load_tensors(checkpoint / f"random_states_{accelerator.process_index}.pkl")
        accelerator.load_state(str(checkpoint))
        return cls(**_read(checkpoint)["progress"])


def _read(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / PROGRESS_FILE
    try:
        content = json.loads(path.read_text())
        content["settings"], content["progress"]  # noqa: B018 - are they there?
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no progress of fit() ({error!r}). It is truncated or broken.") from error
    return content


def checkpoint_to_resume(folder: Path | None, resume: bool | str | os.PathLike | None) -> Path | None:
    """Find the checkpoint that a run is to go on from; None if it starts.

    Args:
        folder: The run's output folder, if it has one.
        resume: True for the last one there, or the folder of one.

    Raises:
        ValueError: The folder holds checkpoints of another run.
        FileNotFoundError: There is no checkpoint to resume from.
    """
    found = {} if folder is None else _checkpoints_in(folder)
    if resume is None or resume is False:
        if found:
            raise ValueError(
                f"{folder} holds checkpoints of another run (checkpoint-{max(found)}). Pass "
                "resume_from_checkpoint=True to go on with it, or another output_dir."
            )
        return None
    if resume is True:
        if not found:
            raise FileNotFoundError(f"There is no checkpoint to resume from in output_dir={folder}.")
        return found[max(found)]
    checkpoint = Path(resume)
    if not (checkpoint / PROGRESS_FILE).is_file():
        raise FileNotFoundError(
            f"{checkpoint} is no checkpoint of fit(): there is no {PROGRESS_FILE}. Pass a folder checkpoint-<step>."
        )
    return checkpoint


def _checkpoints_in(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match and (path / PROGRESS_FILE).is_file()}


@dataclass(frozen=True)
class Saver:
    """Writes checkpoints and the student, each beside its place and renamed."""

    accelerator: Accelerator
    data: TrainingData
    moments: Moments
    folder: Path | None
    every: int | None
    keep: int

    def save_if_due(self, progress: Progress, until: int) -> None:
        """Write a checkpoint after so many steps, and after the last."""
        if self.every is not None and (progress.step % self.every == 0 or progress.step == until):
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        place, main = self.folder / f"checkpoint-{progress.step}", self.accelerator.is_main_process
        with whole_folder(place, replace=True) if main else nullcontext(beside(place)) as folder:
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(folder))
            self.moments.save(folder)
            self.accelerator.wait_for_everyone()
            if main:
                self.moments.sidecars.save(folder)
                progress.save(folder, self.data)
        if main:
            self._forget_old(progress.step)
        self.accelerator.wait_for_everyone()

    def _forget_old(self, just_written: int) -> None:
        others = sorted(step for step in _checkpoints_in(self.folder) if step != just_written)
        for step in others[: max(0, len(others) + 1 - self.keep)]:
            remove_folder(self.folder / f"checkpoint-{step}")

    def save_student(self, student: nn.Module) -> None:
        """Write the trained student and its sidecars into the output folder."""
        if self.folder is not None and self.accelerator.is_main_process:
            settle(self.folder, "checkpoint-*")  # also of a killed run of which only this was left to do
            with whole_file(self.folder / MODEL_FILE) as path:
                save_model(student, str(path))
            if isinstance(student, PreTrainedModel):
                config = copy.deepcopy(student.config)
                config.architectures = [type(student).__name__]  # what save_pretrained says, and loaders look for
                config.save_pretrained(self.folder)
            self.moments.sidecars.save(self.folder)
        self.accelerator.wait_for_everyone()
