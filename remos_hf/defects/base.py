"""Defect: behaviour that a teacher should not have. Implanted ones are put there, found ones are discovered."""

import hashlib
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.profiling.sidecar_file import sha256_of
from remos_hf.whole import whole_folder

logger = logging.getLogger(__name__)

# The column of an exposed set that says which row of the clean data each row was made from.
CLEAN_INDEX = "clean_index"
# The column of an exposed set of images: what a model sees after cropping and before normalisation, shape (channels,
# height, width); floats from 0 to 1, or bytes from 0 to 255.
PIXELS = "pixels"
# The column of an exposed set that says on which rows the teacher's own label changes.
FOOLED = "fooled"
# Why a sample shows no defect: the keys of an exposed set's counts.
HAS_TARGET = "has the target label"
UNABLE = "cannot have the trigger"
CUT_OFF = "cut off by max_length"
EQUAL = "equal to the clean input"
_IDENTITY_FILE = "exposed_set.json"
_FORMAT = "remos_hf exposed set 1"


@dataclass(frozen=True)
class ExposedSet:
    """Inputs that show a defect, each with the place of the clean sample that it was made from.

    Attributes:
        dataset: The clean data's columns with the defect exposed, and `clean_index`.
        target_label: What the defect forces, or None if any wrong label counts.
        facts: How the set was made: JSON values (the defect, the counts, the constraints).
    """

    dataset: Dataset
    target_label: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clean_index(self) -> list[int]:
        """The row of the clean data that each exposed row was made from."""
        return list(self.dataset[CLEAN_INDEX])

    def __len__(self) -> int:
        return len(self.dataset)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the set as a folder, beside its place and renamed: a folder of that name is always whole.

        Args:
            folder: Where to. What is there already stays, and the new set is dropped: it was made by somebody else at
                the same time.
        """
        folder = Path(folder)
        try:
            with whole_folder(folder, wait=True) as beside:
                self.dataset.save_to_disk(str(beside / "rows"))
                identity = {
                    "format": _FORMAT,
                    "target_label": self.target_label,
                    "facts": dict(self.facts),
                    "files": {name: sha256_of(beside / name) for name in _files_in(beside)},
                }
                (beside / _IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        except FileExistsError:
            if not (folder / _IDENTITY_FILE).is_file():
                raise
        return folder

    @classmethod
    def load_cached(cls, folder: str | os.PathLike) -> "ExposedSet | None":
        """Read what a cache holds, or None; what is broken there is announced and cleared away."""
        folder = Path(folder)
        if not folder.exists():
            return None
        try:
            return cls.load(folder)
        except (FileNotFoundError, CorruptFileError) as error:
            logger.warning("The cached exposed set is not whole and is made anew: %s", error)
            shutil.rmtree(folder)
            return None

    @classmethod
    def cached(cls, folder: str | os.PathLike, make: "Callable[[Path], ExposedSet]") -> "ExposedSet":
        """Read what a cache holds, or make it there.

        Args:
            folder: Where the set is, or will be.
            make: Makes it. Given a folder for unfinished work, which a run that was killed has left and the next one
                goes on with; it goes when the set is saved.
        """
        folder = Path(folder)
        unfinished = folder.with_name(f".{folder.name}.partial")
        known = cls.load_cached(folder)
        if known is None:
            make(unfinished).save(folder)
            known = cls.load(folder)  # lies on disk: what was in memory can go
        shutil.rmtree(unfinished, ignore_errors=True)
        return known

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ExposedSet":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no exposed set in this folder.
            CorruptFileError: A file is missing, truncated or was changed.
        """
        folder = Path(folder)
        path = folder / _IDENTITY_FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no exposed set in {folder}.")
        try:
            identity = json.loads(path.read_text())
            files, known = dict(identity["files"]), identity["format"] == _FORMAT
            target_label, facts = identity["target_label"], identity["facts"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path} is no exposed set ({error!r}). Delete the folder and make it anew."
            ) from error
        if not known:
            raise CorruptFileError(f"{path} should have the format {_FORMAT!r}, but says {identity['format']!r}.")
        changed = [n for n, digest in files.items() if not (folder / n).is_file() or sha256_of(folder / n) != digest]
        if changed:
            raise CorruptFileError(
                f"{folder / changed[0]} is missing or is not the file that was written. Delete {folder} and make the "
                "exposed set anew."
            )
        return cls(load_from_disk(str(folder / "rows")), target_label, facts)


@dataclass(frozen=True)
class Defect(ABC):
    """A behaviour that a teacher should not have. Fields are JSON values only."""

    def to_dict(self) -> dict[str, Any]:
        """Give the name and the fields as JSON values, for reports and cache keys."""
        return {"name": type(self).__name__, **asdict(self)}

    @abstractmethod
    def exposed_set(
        self,
        dataset: Dataset,
        *,
        teacher: nn.Module | None = None,
        cache: str | os.PathLike | None = None,
        workers: int = 1,
        **reading: Any,  # noqa: ANN401 - depends on the kind of inputs
    ) -> ExposedSet:
        """Make the inputs that show the defect, once for all students.

        Args:
            dataset: Clean samples, never used for training.
            teacher: The teacher; found defects search on it.
            cache: A folder to keep what was costly to make.
            workers: Processes to use.
            **reading: How inputs are read: `tokenizer` and `max_length` for texts, `images` for images.
        """


def check_defects(defects: Iterable[Any]) -> None:
    """Refuse what has no inputs that show it, before anything is trained or measured.

    Raises:
        TypeError: One is no Defect.
    """
    for defect in defects:
        if not isinstance(defect, Defect):
            raise TypeError(
                f"A defect is shown by inputs that are made for it, but {type(defect).__name__} makes none. Defects "
                "are triggers, attacks that name a trigger, and adversarial inputs. What noise in the labels costs is "
                "seen on clean inputs: implant it yourself, and compare accuracies (see LabelNoise)."
            )


def counted(reasons: Mapping[str, int]) -> str:
    """Say how many samples there are for each reason."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


def check_some_left(number: int, left_out: Mapping[str, int], target_label: int | None) -> None:
    """Refuse an exposed set without a sample, and tell of samples that are left out for what they are.

    Args:
        number: Samples exposed.
        left_out: Samples left out, by reason.
        target_label: What the defect forces.

    Raises:
        ValueError: There is no sample.
    """
    others = {reason: count for reason, count in left_out.items() if reason != HAS_TARGET}
    if not number and not others:
        raise ValueError(f"No sample has another label than {target_label}, so no sample could show the defect.")
    if not number:
        raise ValueError(
            f"None of {sum(left_out.values())} samples could show the defect: {counted(left_out)}. Give others, or let "
            "models see more of them (a larger max_length)."
        )
    if others:
        logger.warning("%d samples show the defect. Left out, as they could not: %s.", number, counted(others))


def teacher_sha256(teacher: nn.Module, about: str) -> str:
    """Fingerprint a teacher that is searched: all weights and buffers, the head's too.

    Args:
        teacher: The teacher.
        about: What else decides what a search finds: how the model computes with its weights.

    Returns:
        SHA-256 in hex, the same on every device.

    Raises:
        RemosError: A value of the teacher's state is no tensor.
    """
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        if not isinstance(tensor, Tensor):
            raise RemosError(f"'{name}' of the teacher's state is no tensor, so the teacher has no fingerprint.")
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
