"""The files beside a student that say how it came to be."""

import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn
from transformers import PreTrainedModel
from yaml import YAMLError

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.profiling.sidecar_file import check_fields, header_of, is_count, is_hash, json_in, sha256_of
from remos_hf.slicing.competition import Account
from remos_hf.slicing.relevant_slice import SLICE_FILE, RelevantSlice, is_repo_id
from remos_hf.strategies.base import Preparation, Strategy
from remos_hf.whole import replace_file

CONFIG_FILE = "remos_config.json"
SIDECAR_FILES = (CONFIG_FILE, COVERAGE_FILE, SLICE_FILE)
# Python's pickles by name. One runs whatever its writer wanted as soon as it is read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_FORMAT_VERSION = 1
# Bytes. A record has some thousands, with the curve of a ratio search some more.
_LARGEST_CONFIG = 2**24
_MAPPING = ("a JSON object", lambda value: isinstance(value, dict))
_COUNT = ("a whole number", is_count)
_NUMBER = ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
_TEXT = ("a text", lambda value: value is None or isinstance(value, str))
# What an entry holds, by the entry; strategies and searches may be of versions and users that we do not know.
_ENTRIES = {
    "teacher": {"id": _TEXT, "revision": _TEXT, "hash": _TEXT, "license": _TEXT},
    "student": {"class": _TEXT, "library": _TEXT, "architecture": _TEXT},
    "coverage": {
        "num_samples": _COUNT,
        "capped": ("true or false", lambda value: isinstance(value, bool)),
        "criterion": _MAPPING,
        "source": _TEXT,
        "share_never_covered": _NUMBER,
        "data_fingerprint": _TEXT,
    },
    "slice": {
        "num_weights": _COUNT,
        "num_kept": _COUNT,
        "tie_group": _COUNT,
        "share_kept": _NUMBER,
        "squares_reset": ("a number or nothing", lambda value: value is None or _NUMBER[1](value)),
        "ties": _TEXT,
    },
    "strategy": {"name": ("a name", lambda value: isinstance(value, str))},
    "competing": {},
    "ratio_search": {},
    "effect_search": {},
    "start": {},
    "finish": {},
    "training": {
        **dict.fromkeys(("steps", "planned_steps", "best_step", "processes", "gradient_accumulation_steps"), _COUNT),
        **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "epochs"), _NUMBER),
        **dict.fromkeys(("batch_size", "seed"), _COUNT),
        **dict.fromkeys(("lr_scheduler", "optimizer", "precision"), _TEXT),
    },
    "evaluation": {},
}
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
    def of(
        cls,
        strategy: Strategy,
        preparation: Preparation,
        student: nn.Module | None = None,
        *,
        teacher: Mapping[str, str | None] | None = None,
    ) -> "Sidecars":
        """Describe a student that was just prepared.

        Args:
            strategy: How it was started.
            preparation: What that did.
            student: The student, whose config names its teacher; None where there are only files.
            teacher: "id" and "revision" where the caller knows better than the student's config. What is not given
                comes from the student.

        Raises:
            ValueError: Neither the student nor the caller says which teacher it was.
        """
        if student is None and not (teacher or {}).get("id"):
            raise ValueError("The record names the teacher: give the student, or teacher={'id': ..., 'revision': ...}.")
        identity = {"id": None, "revision": None} if student is None else _teacher_identity(student)
        if teacher and teacher.get("id"):
            # Revision and licence in the student's config are those of the teacher which the config names.
            identity = {"id": _public(str(teacher["id"])), "revision": teacher.get("revision")}
        elif teacher and teacher.get("revision"):
            identity["revision"] = teacher["revision"]
        profile, relevant = preparation.profile, preparation.relevant_slice
        config: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "strategy": strategy.to_dict(),
            "teacher": {**identity, "hash": relevant.teacher_hash if relevant else None},
            "seconds": {step: round(seconds, 3) for step, seconds in preparation.seconds.items()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        if student is not None:
            config["student"] = _kind_of(student)
        if profile is not None:
            config["coverage"] = {
                "num_samples": profile.num_samples,
                "capped": profile.capped,
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
            if relevant.account is not None:
                config["competing"] = relevant.account.to_dict()
        if preparation.details:
            config["start"] = dict(preparation.details)
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
        config = {**self.config, "files": {name: sha256_of(path) for name, path in files.items()}}
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
        config = _config_in(path)
        files = config.pop("files")
        for name, digest in files.items():
            if (folder / name).is_file():
                header_of(folder / name)  # a file made to keep its reader busy is not hashed
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise CorruptFileError(
                    f"{folder / name} is missing or is not the file that {CONFIG_FILE} was written with."
                )
        profile = CoverageProfile.load(folder) if COVERAGE_FILE in files else None
        relevant = RelevantSlice.from_pretrained(folder) if SLICE_FILE in files else None
        return cls(config, profile, relevant)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> "Sidecars":
        """Read the files beside a student, wherever it is. From a Hub only they are fetched, never weights.

        Args:
            folder_or_repo_id: A folder, or a repository on the Hub.
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub; the stored one if None.
            endpoint: Another hub than the one that HF_ENDPOINT names.

        Raises:
            FileNotFoundError: Nothing there says how the student was made.
            RemosError: It holds pickled weights only; or the Hub does not give the repository, or cannot be reached.
            CorruptFileError: A file is missing, truncated, tampered with, or of a newer version.
        """
        place = Path(folder_or_repo_id)
        if place.exists() or not is_repo_id(str(folder_or_repo_id)):
            if place.is_dir() and not (place / CONFIG_FILE).is_file():
                refuse_pickles([path.name for path in place.iterdir()], place)
            return cls.load(place)
        repo_id, asked = str(folder_or_repo_id), {"token": token, "endpoint": endpoint}
        path = _fetched(repo_id, CONFIG_FILE, revision, asked)
        if path is None:
            refuse_pickles(_listed(repo_id, revision, asked), repo_id)
            raise FileNotFoundError(
                f"{repo_id} holds no {CONFIG_FILE}, so nothing says how this model was made. It may be a teacher, or a "
                "student that was pushed without its record: push_to_hub(student, ..., record=...) writes it."
            )
        for name in _config_in(path)["files"]:
            # Of the first file's commit, so that a push in between does not mix two students.
            _fetched(repo_id, name, path.parent.name, asked)
        return cls.load(path.parent)

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse to go on with a student that was made another way.

        Raises:
            RemosError: The strategies differ.
        """
        made_by, asked = self.config["strategy"], json.loads(json.dumps(strategy.to_dict()))
        if made_by == asked:
            return
        one, other = made_by, asked
        if made_by["name"] == asked["name"]:  # then only what differs says something
            keys = sorted(key for key in {*made_by, *asked} if made_by.get(key) != asked.get(key))
            one, other = ({key: recipe.get(key) for key in keys} for recipe in (made_by, asked))
        raise RemosError(
            f"The checkpoint was made by {made_by['name']} with {_told(one)}, but the trainer asks for {asked['name']} "
            f"with {_told(other)}. Resume with the same strategy, or start anew from the teacher."
        )


def _told(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in recipe.items() if key != "name") or "its defaults"


def refuse_pickles(names: Collection[str], place: str | os.PathLike) -> None:
    """Refuse a model of which there are pickled weights and no others.

    Raises:
        RemosError: Among the names are pickles, and no weights as safetensors.
    """
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    weights = [name for name in names if name.endswith(".safetensors") and name not in SIDECAR_FILES]
    if pickles and not weights:
        raise RemosError(
            f"{place} holds its weights as pickles only ({', '.join(pickles[:3])}). Reading a pickle runs whatever its "
            "writer put into it, so it is never opened here. Ask its owner for safetensors, or convert it where "
            "nothing can be harmed, with save_pretrained."
        )


def _config_in(path: Path) -> dict[str, Any]:
    """Read a record, with `files`, and make sure that each entry is what it should be."""
    if path.stat().st_size > _LARGEST_CONFIG:
        raise CorruptFileError(f"{path} has {path.stat().st_size:,} bytes; a record has some thousands. It is broken.")
    config = json_in(path, path.read_bytes())
    if not isinstance(config, dict) or not {"format_version", "files", "strategy", "teacher"} <= config.keys():
        found = sorted(config)[:8] if isinstance(config, dict) else type(config).__name__
        raise CorruptFileError(f"{path} is no record of a student: it says {found}. It is truncated or broken.")
    check_fields(path, config, {"format_version": _COUNT})
    if config["format_version"] > _FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format {config['format_version']}, newer than the {_FORMAT_VERSION} this remos_hf reads. "
            "Update remos_hf."
        )
    objects = ("files", "seconds", "versions", *_ENTRIES)
    check_fields(path, config, {**dict.fromkeys(objects, _MAPPING), "command": _TEXT, "embedding_rows_reset": _COUNT})
    foreign = [name for name in config["files"] if name not in (COVERAGE_FILE, SLICE_FILE)]
    if foreign:
        raise CorruptFileError(f"{path} names {foreign[0]!r}, which is no file of ours. It was changed by others.")
    entries = {name: _ENTRIES[name] for name in config.keys() & _ENTRIES.keys()}
    entries["files"] = dict.fromkeys(config["files"], ("a SHA-256", lambda value: value and is_hash(value)))
    entries["seconds"] = dict.fromkeys(config.get("seconds", ()), _NUMBER)
    entries["versions"] = dict.fromkeys(config.get("versions", ()), _TEXT)
    for name, expected in entries.items():
        check_fields(path, config.get(name, {}), expected)
    if "competing" in config:
        try:
            Account.from_dict(config["competing"])
        except ValueError as error:
            raise CorruptFileError(f"{path} says of what competes what cannot be: {error}") from error
    return config


def _fetched(repo_id: str, name: str, revision: str | None, asked: Mapping[str, Any]) -> Path | None:
    """Give a file of a repository on the Hub; None if the repository does not hold it."""
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, **asked))
    except (HTTPError, OSError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _not_given(error, repo_id, revision) from error


def _listed(repo_id: str, revision: str | None, asked: Mapping[str, Any]) -> list[str]:
    try:
        return HfApi(**asked).list_repo_files(repo_id, revision=revision)
    except (HTTPError, OSError) as error:
        raise _not_given(error, repo_id, revision) from error


def _not_given(error: Exception, repo_id: str, revision: str | None) -> RemosError:
    """Say what a reader can do about a Hub that does not give a file."""
    if isinstance(error, RepositoryNotFoundError):
        return RemosError(
            f"There is no repository {repo_id} on the Hub, or the token may not see it. A private one needs a token: "
            "run `hf auth login`, or pass token=. A folder of that name was not found either."
        )
    if isinstance(error, RevisionNotFoundError):
        return RemosError(f"{repo_id} has no revision {revision!r}. Give a branch, a tag or a commit that it has.")
    return RemosError(
        f"The Hub did not give the record of {repo_id} ({type(error).__name__}: {str(error).strip()[:300]}). Without a "
        "network, give the folder of a copy, or fetch it once while there is one: then it is read from the cache."
    )


def _teacher_identity(student: nn.Module) -> dict[str, str | None]:
    config = getattr(student, "config", None)
    body = getattr(student, "body", student)  # of an ImageClassifier
    published = getattr(body, "pretrained_cfg", None) or {}  # timm's
    name = getattr(config, "_name_or_path", None) or published.get("hf_hub_id") or type(body).__name__
    revision = getattr(config, "_commit_hash", None)
    licence = published.get("license") or _licence_of(name, revision)
    return {"id": _public(name), "revision": revision, **({"license": str(licence)} if licence else {})}


def _licence_of(teacher: str, revision: str | None) -> str | None:
    """Give the licence that a teacher's own card names, if the card lies on this machine; nothing is fetched."""
    card: Any = Path(teacher) / "README.md"
    if not Path(teacher).is_dir():
        card = try_to_load_from_cache(teacher, "README.md", revision=revision) if is_repo_id(teacher) else None
    try:
        found = (metadata_load(card) or {}).get("license") if isinstance(card, str | Path) else None
    except (OSError, ValueError, YAMLError):  # none there, or somebody's card that is no card
        return None
    return found if isinstance(found, str) else None


def _public(name: str) -> str:
    """A local path says nothing to others and may tell them more than its owner wants."""
    local = Path(name).is_dir() or name.startswith(("/", "~", ".")) or "\\" in name
    return PurePosixPath(name.replace("\\", "/")).name or name if local else name


def _kind_of(student: nn.Module) -> dict[str, str | None]:
    """Say what loads a student: the class, and what it comes from."""
    body = getattr(student, "body", student)
    published = getattr(body, "pretrained_cfg", None) or {}
    if isinstance(student, PreTrainedModel):
        return {"class": type(student).__name__, "library": "transformers"}
    if published.get("architecture"):
        return {"class": type(student).__name__, "library": "timm", "architecture": str(published["architecture"])}
    return {"class": type(student).__name__, "library": "torch", "architecture": type(body).__name__}
