"""The files beside a student that say how it came to be."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from remos_hf.coverage.profile import COVERAGE_FILE, CoverageProfile
from remos_hf.coverage.sidecar_file import replace_file
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.slicing.relevant_slice import SLICE_FILE, RelevantSlice
from remos_hf.strategies.base import Preparation, Strategy

CONFIG_FILE = "remos_config.json"
_FORMAT_VERSION = 1
_PACKAGES = ("remos_hf", "torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Sidecars:
    """How a student came to be: what is written beside it, and read when training resumes.

    Attributes:
        config: Contents of `remos_config.json`.
        profile: Contents of `remos_coverage.safetensors`, if there is one.
        relevant_slice: Contents of `remos_slice.safetensors`, if there is one.
    """

    config: dict[str, Any]
    profile: CoverageProfile | None = None
    relevant_slice: RelevantSlice | None = None

    @classmethod
    def of(cls, strategy: Strategy, preparation: Preparation, student: nn.Module) -> "Sidecars":
        """Describe a student that was just prepared."""
        profile, relevant = preparation.profile, preparation.relevant_slice
        config: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "strategy": strategy.to_dict(),
            "teacher": {**_teacher_identity(student), "hash": relevant.teacher_hash if relevant else None},
            "seconds": {step: round(seconds, 3) for step, seconds in preparation.seconds.items()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        if profile is not None:
            config["coverage"] = {
                "num_samples": profile.num_samples,
                "criterion": dict(profile.criterion),
                "source": profile.source,
                "share_never_covered": profile.share_never_covered,
                "data_fingerprint": profile.data_fingerprint,
            }
        if relevant is not None:
            config["slice"] = {
                "num_weights": relevant.num_weights,
                "num_kept": relevant.num_kept,
                "share_kept": relevant.share_kept,
                "tie_group": relevant.tie_group,
                "ties": relevant.ties,
                "squares_reset": preparation.squares_reset,
            }
        if preparation.rows_reset:
            config["embedding_rows_reset"] = preparation.rows_reset
        return cls(config, profile, relevant)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the files, each beside its place and renamed; the config, which names the others' hashes, last."""
        folder = Path(folder)
        files = {}
        if self.profile is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files[COVERAGE_FILE] = self.profile.save(folder)
        if self.relevant_slice is not None:
            files[SLICE_FILE] = self.relevant_slice.save_pretrained(folder)
        config = {**self.config, "files": {name: _sha256(path) for name, path in files.items()}}
        replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Sidecars":
        """Read the files beside a student.

        Raises:
            FileNotFoundError: There is no `remos_config.json`.
            CorruptFileError: A file is missing, truncated, tampered with, or of a newer version.
        """
        folder = Path(folder)
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}, so nothing says how this student was made. It was not saved by RemosTrainer, "
                "fit or attach_remos."
            )
        try:
            config = json.loads(path.read_text())
            files = config.pop("files")
            found = int(config["format_version"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path} is no sidecar config ({error!r}). It is truncated or broken.") from error
        if found > _FORMAT_VERSION:
            raise CorruptFileError(
                f"{path} has format {found}, newer than the {_FORMAT_VERSION} this remos_hf reads. Update remos_hf."
            )
        for name, digest in files.items():
            if not (folder / name).is_file() or _sha256(folder / name) != digest:
                raise CorruptFileError(
                    f"{folder / name} is missing or is not the file that {CONFIG_FILE} was written with."
                )
        profile = CoverageProfile.load(folder) if COVERAGE_FILE in files else None
        relevant = RelevantSlice.from_pretrained(folder) if SLICE_FILE in files else None
        return cls(config, profile, relevant)

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse to go on with a student that was made another way.

        Raises:
            RemosError: The strategies differ.
        """
        made_by, asked = self.config["strategy"], json.loads(json.dumps(strategy.to_dict()))
        if made_by != asked:
            raise RemosError(
                f"The checkpoint was made by {made_by}, but the trainer asks for {asked}. Resume with the same "
                "strategy, or start anew from the teacher."
            )


def _teacher_identity(student: nn.Module) -> dict[str, str | None]:
    config = getattr(student, "config", None)
    body = getattr(student, "body", student)  # of an ImageClassifier
    published = getattr(body, "pretrained_cfg", None) or {}  # timm's
    name = getattr(config, "_name_or_path", None) or published.get("hf_hub_id") or type(body).__name__
    # A local path says nothing to others and may tell them more than its owner wants.
    public = Path(name).name if Path(name).is_dir() else name
    return {"id": public, "revision": getattr(config, "_commit_hash", None)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
