"""The files of a teacher: safetensors and JSON in one folder, looked at before anything is built from them.

Nothing outside the folder is opened, whatever an index or a link names, and no pickle is opened at all. The files are
read with plain reads and never mapped: a mapped file would count as memory, and one that is cut short meanwhile would
kill the process.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from remos_hf.errors import CorruptFileError, UnsupportedModelError

# By the names that safetensors gives.
RANKABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOATING = {**RANKABLE, "F64": torch.float64}
_WHOLE_NUMBERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz", ".th")
# What belongs to a checkpoint beside its weights: configs and tokenizers. No pickle, no program.
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".codes", ".vocab", ".tiktoken")
_READ_SUFFIXES = (*SIDE_SUFFIXES, ".safetensors")
_SHARD_NUMBER = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_MAX_JSON_BYTES = 2**28


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, by the place of its bytes.

    Attributes:
        path: The file.
        name: Its name there.
        dtype: As safetensors names it: "F32", "BF16", "I64".
        shape: Its shape.
        start: First byte, from the start of the file.
        stop: Byte after the last.
    """

    path: Path
    name: str
    dtype: str
    shape: torch.Size
    start: int
    stop: int

    def read(self) -> Tensor:
        """Read all of it, on the CPU. Its dtype must be a floating one."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            return read_values(file, self.shape.numel(), FLOATING[self.dtype], self.path).view(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder, whose tensors are read when asked for.

    Attributes:
        paths: Files of weights, sorted.
        tensors: Their tensors by name.
        index: The file that says which shard holds what; None if there is one file.
        states: Size and time of each file when it was first looked at.
    """

    paths: list[Path]
    tensors: dict[str, StoredTensor]
    index: Path | None
    states: dict[Path, tuple[int, int]]

    @classmethod
    def in_folder(cls, folder: Path) -> "Checkpoint":
        """Find the weights that `from_pretrained` would load, and check that the files hold what they say.

        Raises:
            FileNotFoundError: There are none.
            UnsupportedModelError: There are only pickles, or a tensor is of a type that no weight has.
            CorruptFileError: A file is truncated, missing, lies outside the folder, or holds a tensor twice.
        """
        single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
        if single.is_file():
            weight_map, index, paths = None, None, [single]
        elif index.is_file():
            check_inside(index, folder)
            weight_map = _read_weight_map(index)
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise _no_weights(folder)
        tensors: dict[str, StoredTensor] = {}
        states = {}
        for path in paths:
            check_inside(path, folder)
            states[path] = _state(path)
            for tensor in read_header(path):
                if tensor.name in tensors:
                    raise CorruptFileError(
                        f"Both {tensors[tensor.name].path} and {path} hold '{tensor.name}', and nothing says which one "
                        "counts. Fetch the checkpoint again."
                    )
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _check_weight_map(index, weight_map, tensors)
        return cls(paths, tensors, index, states)

    @property
    def num_bytes(self) -> int:
        """Size of the files of weights."""
        return sum(size for size, _ in self.states.values())

    def tensors_in(self, path: Path) -> list[StoredTensor]:
        """Give the tensors of one file in the order of their bytes."""
        return sorted((tensor for tensor in self.tensors.values() if tensor.path == path), key=lambda t: t.start)

    def check_unchanged(self) -> None:
        """Refuse files that were written since they were first looked at: what was decided goes by other weights.

        Raises:
            CorruptFileError: One was.
        """
        for path, state in self.states.items():
            if _state(path) != state:
                raise CorruptFileError(f"{path} was changed while it was read. Slice it when nothing writes to it.")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is a link to somewhere else. Links of the Hub's cache to its own blobs are followed.

    Raises:
        CorruptFileError: It leads out of the folder.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise CorruptFileError(
            f"{path} is a link to {path.resolve()}, outside the checkpoint, and nothing outside it is read. Put the "
            "file itself there, or remove the link."
        )


def check_links(folder: Path) -> None:
    """Refuse links out of the folder among the files that are read: configs, tokenizers, weights.

    Raises:
        CorruptFileError: There is one.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.name.endswith(_READ_SUFFIXES):
            check_inside(path, folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptFileError: It is none, is absurdly large, or names something twice.
    """
    found = read_any_json(path)
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} should be a JSON object, but is a {type(found).__name__}. Fetch it again.")
    return found


def read_any_json(path: Path) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Read JSON of any kind.

    Raises:
        CorruptFileError: It is none, is absurdly large, or names something twice.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptFileError(f"{path} is larger than {_MAX_JSON_BYTES} bytes, which no config or index is.")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} should be JSON, but cannot be read ({error}). Fetch it again.") from error


def read_header(path: Path) -> list[StoredTensor]:
    """Read what a safetensors file says it holds, after its own library has checked that against its size.

    Raises:
        CorruptFileError: It is broken.
        UnsupportedModelError: Another framework wrote it, or a tensor has a type that no weight has.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=without_repeats)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{path} cannot be read as safetensors ({error}). It is truncated or broken: fetch it again."
        ) from error
    written_by = (header.pop("__metadata__", None) or {}).get("format", "pt")
    if written_by != "pt":
        raise UnsupportedModelError(
            f"{path} was written by {written_by!r}, which may lay out weights in another way than PyTorch ('pt'). Load "
            "it there, and save it again for PyTorch."
        )
    found = []
    for name, entry in header.items():
        if entry["dtype"] not in FLOATING and entry["dtype"] not in _WHOLE_NUMBERS:
            raise wrong_dtype(name, path, entry["dtype"])
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        found.append(StoredTensor(path, name, entry["dtype"], torch.Size(entry["shape"]), start, stop))
    return found


def wrong_dtype(name: str, path: Path, dtype: str) -> UnsupportedModelError:
    """Say that a tensor's type is none that a weight may have."""
    return UnsupportedModelError(
        f"'{name}' in {path} cannot be ranked: its dtype is {dtype}, and weights are F32, BF16 or F16. Take the "
        "unquantised checkpoint."
    )


def read_values(file: BinaryIO, count: int, dtype: torch.dtype, path: Path) -> Tensor:
    """Read numbers from an open file. Shape (count,).

    Raises:
        CorruptFileError: It ends before.
    """
    values = torch.empty(count, dtype=dtype)
    buffer = memoryview(values.view(torch.uint8).numpy())
    filled = 0
    while filled < len(buffer):
        got = file.readinto(buffer[filled:])
        if not got:
            raise cut_short(path)
        filled += got
    return values


def cut_short(path: Path) -> CorruptFileError:
    """Say that a file ended earlier than its header says."""
    return CorruptFileError(f"{path} became shorter while it was read. Slice it when nothing writes to it.")


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be opened ({error.strerror}). Fetch the checkpoint again.") from error
    return found.st_size, found.st_mtime_ns


def _no_weights(folder: Path) -> Exception:
    return only_pickles(str(folder), [path.name for path in folder.iterdir()])


def only_pickles(place: str, names: list[str]) -> Exception:
    """Say why there are no weights that may be read, by the names of the files that there are."""
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled:
        return UnsupportedModelError(
            f"{place} holds its weights only as {pickled[0]}, which may run any code when it is opened; a teacher is "
            f"not to be trusted. Only {SAFE_WEIGHTS_NAME} is read: take a revision that has it, or convert the file on "
            "a machine where nothing can be harmed, and save it as safetensors."
        )
    return FileNotFoundError(
        f"{place} holds no weights: it should hold {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its shards. "
        "Give the folder of a saved model."
    )


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, or refuse one that names something twice: readers disagree on which counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names '{name:.100}' twice")
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index)
    weight_map = listed.get("weight_map")
    if not isinstance(listed.get("metadata"), dict):
        raise CorruptFileError(f"{index} should hold metadata (a JSON object) beside its weight_map, but does not.")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError(f"{index} should name a file for every tensor (weight_map), but does not.")
    names = set(weight_map.values())
    for name in sorted(names):
        if re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII) is None:
            raise CorruptFileError(
                f"{index} names the file {name!r}, but shards are safetensors files in the folder itself. "
                "Nothing outside it is read."
            )
        numbered = _SHARD_NUMBER.fullmatch(name)
        if numbered and int(numbered[1]) != len(names):
            raise CorruptFileError(
                f"{index} names {name!r}, one of {int(numbered[1])} shards, but {len(names)} in all. "
                "Fetch the checkpoint again."
            )
        if not (index.parent / name).is_file():
            raise CorruptFileError(f"{index} names the shard {name!r}, which is not there. Fetch the checkpoint again.")
    return weight_map


def _check_weight_map(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CorruptFileError(
                f"{index} says that '{name}' is in {file}, but it is not. Fetch the checkpoint again."
            )
    unnamed = [name for name in tensors if name not in weight_map]
    if unnamed:
        raise CorruptFileError(
            f"{tensors[unnamed[0]].path} holds '{unnamed[0]}', which {index} does not name. Fetch the checkpoint again."
        )
