"""What may leave this machine: the files of a student, by kind. What is not listed here stays, and is told."""

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.sharing.record import SIDECAR_FILES, refuse_pickles

CARD_FILE = "README.md"
REPORT_FILE = "report.json"
RESULTS_FOLDER = ".eval_results"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CONFIGS = ("config.json", "generation_config.json", "modules.json")
_PROCESSORS = re.compile(r"((image_|video_)?(pre)?processor|feature_extractor)_config\.json")
# As the tokenizers of transformers name what they save.
_TOKENIZERS = re.compile(
    r"(tokenizer|vocab|added_tokens|special_tokens_map|tokenizer_config|normalizer|entity_vocab|tekken|source_vocab|"
    r"target_vocab|vocab-src|vocab-tgt|chat_template)\.json|(vocab|merges|dict|bpe\.codes|emoji)\.txt|vocab\.bpe|bpe\.codes|"
    r"(tokenizer|spiece|sentencepiece|sentencepiece\.bpe|spm|spm_char)\.model|(source|target)\.spm|emoji\.json|"
    r"\w+\.tiktoken|chat_template\.jinja|(config_)?sentence_(bert|transformers)(_config)?\.json"
)
_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
_LICENCES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)(\.txt|\.md)?", re.IGNORECASE)
_SHOWN = re.compile(r"""(?:\]\(|(?:src|href)=["'])(?!\w+:|/|\.\.)([\w./-]+\.(?:png|svg|jpe?g|webp|gif|html))[)"']""")
# Entries of configs that are words of a model, whatever they look like.
_WORDS = ("chat_template", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "id2label")
# Where paths begin on a machine of whatever kind.
_ROOTS = ("home", "Users", "root", "mnt", "media", "tmp", "var", "opt", "srv", "private", "Volumes", "content")
_LONGEST_PATH = 4096
_LOCAL_PATH = re.compile(r"(?<![\w.:/<])(?:~|[A-Za-z]:|/[^/\s'\"<>]+|\\\\[^\\\s'\"]+)[/\\][^\s'\"<>]+")


@dataclass(frozen=True)
class Pushable:
    """What of a folder may be pushed.

    Attributes:
        files: The files by their names in the repository.
        behind: Names of all others, which stay.
        weights: Names of the weights among the files; empty if the folder holds none.
    """

    files: dict[str, Path]
    behind: tuple[str, ...]
    weights: tuple[str, ...]


def pushable_files(folder: Path) -> Pushable:
    """Find the files of a student in a folder that others may have written to as well.

    These are weights as safetensors with their index, or adapters; configs; tokenizers and processors; our record and
    report; licences; figures in `.eval_results`; and images and pages that the README.md shows. A file is what its name
    says, and weights also what their header says.

    Args:
        folder: The student's folder.

    Raises:
        CorruptFileError: Weights are no safetensors file, or the index does not go with its shards.
    """
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    weights = _weights(folder, names)
    allowed = {*weights, *_shown(names.get(CARD_FILE)), *_in_modules(names)}
    if WEIGHTS_FILE not in weights:  # beside whole weights nobody reads it
        allowed.add(INDEX_FILE)
    files = {name: path for name, path in names.items() if name in allowed or _is_known(name)}
    return Pushable(files, tuple(name for name in names if name not in files), weights)


def check_weights(found: Pushable, place: Path, *, started_otherwise: bool) -> None:
    """Refuse to push a student whose weights are not there, or are not all of it.

    Args:
        found: What of the place may be pushed.
        place: For the message.
        started_otherwise: Whether the student did not start as its whole teacher, which adapters need.

    Raises:
        RemosError: There are none; or adapters, which would be put onto the teacher as it was.
    """
    if any(name in found.files for name in ADAPTER_FILES) and (started_otherwise or found.weights != ADAPTER_FILES[1:]):
        raise RemosError(
            f"{place} holds adapters that were not merged ({ADAPTER_FILES[0]}). Pushed, they would be loaded onto the "
            "unsliced teacher: push student.merge_and_unload(), or the folder that RemosTrainer.save_model wrote."
        )
    if not found.weights:
        refuse_pickles([name for name in found.behind if "/" not in name], place)
        raise RemosError(
            f"{place} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE} with its shards. Save the student "
            "there first (RemosTrainer.save_model, save_pretrained)."
        )


def is_of_a_student(name: str) -> bool:
    """Whether a file of a repository is one that a push writes anew or means to be gone: weights, record, report."""
    whole = (WEIGHTS_FILE, INDEX_FILE, *ADAPTER_FILES, *SIDECAR_FILES, REPORT_FILE)
    return name in whole or bool(_SHARD.fullmatch(name)) or name.startswith(f"{RESULTS_FOLDER}/remos_")


def is_config(name: str) -> bool:
    """Whether a file holds settings, and no vocabulary: a place where paths may stand."""
    return name.endswith("config.json") or name == REPORT_FILE


def without_local_paths(content: Any) -> Any:  # noqa: ANN401 - JSON
    """Give JSON values with every path of this machine cut to its last part; a model's words stay as they are."""
    if isinstance(content, dict):
        return {key: one if key in _WORDS else without_local_paths(one) for key, one in content.items()}
    if isinstance(content, list):
        return [without_local_paths(one) for one in content]
    return public_text(content) if isinstance(content, str) else content


def public_text(text: str) -> str:
    """Cut paths of this machine in a text to their last parts: they say where things lie, and whose they are."""
    if _LOCAL_PATH.match(text) and len(text) < _LONGEST_PATH and os.path.lexists(text):
        return _last_part(text)  # with its blanks
    return _LOCAL_PATH.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    if path.startswith("/"):
        root = path.split("/")[1]
        # Two parts may be an id, such as a class of Open Images; three are a path, of this machine or another.
        if path.count("/") < 3 and root not in _ROOTS and not Path("/", root).is_dir():
            return path
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def _is_known(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if parts[0] == RESULTS_FOLDER:
        # Ours are rendered anew; anyone else's are figures of their own.
        return len(parts) == 2 and parts[1].endswith(".yaml") and not parts[1].startswith(("remos_", "."))
    known = name in (*_CONFIGS, *ADAPTER_FILES, *SIDECAR_FILES, CARD_FILE, REPORT_FILE)
    return known or any(kind.fullmatch(name) for kind in (_PROCESSORS, _TOKENIZERS, _TEMPLATES, _LICENCES))


def _weights(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    if WEIGHTS_FILE in names:
        _tensors(folder / WEIGHTS_FILE)
        return (WEIGHTS_FILE,)
    if INDEX_FILE in names:
        return _shards(folder / INDEX_FILE, names)
    if ADAPTER_FILES[1] in names:
        _tensors(folder / ADAPTER_FILES[1])
        return ADAPTER_FILES[1:]
    return ()


def _shards(index: Path, names: Collection[str]) -> tuple[str, ...]:
    try:
        placed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = tuple(sorted(set(placed.values())))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(
            f"{index} should say which shard holds which weight, but does not ({error!r})."
        ) from error
    for shard in shards:
        if not isinstance(shard, str) or shard not in names or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise CorruptFileError(
                f"{index} names the shard {shard!r}, but beside it there is no such safetensors file."
            )
    missing = placed.keys() - {name for shard in shards for name in _tensors(index.parent / shard)}
    if missing:
        raise CorruptFileError(f"{index} places '{min(missing)}' in a shard, but none of its shards holds it.")
    return shards


def _tensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} is no safetensors file ({error}). Save the student anew.") from error


def _shown(card: Path | None) -> Iterator[str]:
    if card is not None:
        for found in _SHOWN.finditer(card.read_text(encoding="utf-8", errors="replace")):
            yield PurePosixPath(found[1]).as_posix()


def _in_modules(names: dict[str, Path]) -> list[str]:
    """Name the files of sentence-transformers' modules, each in a folder that `modules.json` names."""
    if "modules.json" not in names:
        return []
    try:
        folders = {str(one["path"]) for one in json.loads(names["modules.json"].read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{names['modules.json']} should list modules and their paths ({error!r}).") from error
    return [
        name
        for name in names
        if name.count("/") == 1 and name.split("/")[0] in folders - {RESULTS_FOLDER} and _is_of_a_module(name)
    ]


def _is_of_a_module(name: str) -> bool:
    within = name.split("/")[1]
    return within in ("config.json", WEIGHTS_FILE) or bool(_TOKENIZERS.fullmatch(within))
