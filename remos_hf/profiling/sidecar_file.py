"""One file beside a student: safetensors with JSON metadata and a checksum, written beside its place and renamed."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from remos_hf.adapters.teacher_files import without_repeats
from remos_hf.errors import CorruptFileError
from remos_hf.whole import replace_file

# Bytes: the longest header that safetensors reads; a size from which on a file is not read if most of it is a hole.
_LONGEST_HEADER = 100_000_000
_LARGE = 2**28
_LONGEST_SHOWN = 80

Fits = Callable[[Any], bool]


def file_in(path: str | os.PathLike, name: str) -> Path:
    """Give the path of a file that is named itself or by its folder."""
    path = Path(path)
    return path / name if path.is_dir() else path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, object]) -> Path:
    """Write tensors and JSON metadata with a checksum over both; the old file stays until the new one is whole."""
    # A copy even of what is contiguous: one element counts as such whatever its stride, and cannot be seen as bytes.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps(metadata)  # keys keep their order: that of a slice is the order of its layers
    header = {"format": kind, "metadata": text, "checksum": _checksum(tensors, text)}
    replace_file(path, _in_order(save(tensors, metadata=header)))
    return path


def _in_order(content: bytes) -> bytes:
    # safetensors writes its metadata in another order each time, so that a file pushed again would be another file.
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[stop:]


def read_tensors(
    path: Path, kind: str, fields: Iterable[str], *, optional: Iterable[str] = (), finite: bool = True
) -> tuple[dict[str, Tensor], dict]:
    """Read what `write_tensors` wrote. The metadata must hold these fields, may hold the optional ones, and no other.

    Whoever wrote the file, nothing is read or allocated before its header goes with its size. The tensors lie in the
    file until they are looked at. Numbers of the metadata are finite unless `finite` is False.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: The file is truncated, of another kind, lacks a field, does not match its checksum, or says
            what cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. A student saved by RemosTrainer has it beside its weights.")
    header = header_of(path)
    if header.get("format") != kind:
        raise CorruptFileError(
            f"{path} should have the format {kind}, but says {header.get('format', 'nothing')!r}. "
            "It is another file, or was written by another version of remos_hf."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        found = _checksum(tensors, header["metadata"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path} cannot be read as safetensors ({error}). It is truncated or broken: fetch it again."
        ) from error
    if found != header.get("checksum"):
        raise CorruptFileError(f"{path} does not match its checksum: its contents were changed after it was written.")
    metadata = json_in(path, header["metadata"], finite=finite)
    if not isinstance(metadata, dict) or metadata.keys() - set(optional) != set(fields):
        found = sorted(metadata) if isinstance(metadata, dict) else type(metadata).__name__
        raise CorruptFileError(f"{path} should say {sorted(fields)}, but says {found}. It was not written by remos_hf.")
    return tensors, metadata


def header_of(path: Path) -> dict[str, str]:
    """Give our part of a safetensors header, once the whole header goes with the size of the file.

    Raises:
        CorruptFileError: It does not, or there is none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CorruptFileError(f"{path} is truncated or no safetensors file: its {size:,} bytes hold no header.")
        header = json_in(path, file.read(length))
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path} cannot be read as safetensors: its header is no JSON object.")
    ours = header.pop("__metadata__", {})
    if not isinstance(ours, dict) or not all(isinstance(one, str) for one in ours.values()):
        raise CorruptFileError(f"{path} cannot be read as safetensors: its header's metadata are no texts.")
    try:
        claimed = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors: its header names no tensors.") from error
    if claimed != size - 8 - length:
        raise CorruptFileError(
            f"{path} should hold {claimed:,} bytes of tensors, but holds {size - 8 - length:,}. It is truncated."
        )
    _check_filled(path)
    return ours


def json_in(path: Path, text: str | bytes, *, finite: bool = True) -> Any:  # noqa: ANN401 - JSON
    """Give the JSON values of a text that a file holds: each key once, and finite numbers unless told otherwise.

    Raises:
        CorruptFileError: It is no such JSON, or is nested beyond reason.
    """
    try:
        checks = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
        return json.loads(text, object_pairs_hook=without_repeats, **checks)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} holds no JSON that we would write ({error}). It is broken.") from error


def check_fields(path: Path, found: Mapping[str, Any], expected: Mapping[str, tuple[str, Fits]]) -> None:
    """Make sure that fields of a file are what they should be.

    Args:
        path: The file, for the message.
        found: Its fields.
        expected: By field, what it should be in words, and whether a value is that. A field that is missing passes.

    Raises:
        CorruptFileError: One is not; the message names it, its value, and what was expected.
    """
    for name, (words, fits) in expected.items():
        if name in found and not fits(found[name]):
            value = repr(found[name])
            value = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
            raise CorruptFileError(f"{path} should say {words} for {name}, but says {value}. It is broken.")


def is_count(value: object, most: float = 2**53) -> bool:
    """Whether a value is a whole number from 0 on, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_hash(value: object) -> bool:
    """Whether a value is a SHA-256 in hex, or "" where none was taken."""
    return isinstance(value, str) and re.fullmatch(r"(?:[0-9a-f]{64})?", value) is not None


def sha256_of(path: Path) -> str:
    """Give a file's SHA-256 in hex, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _check_filled(path: Path) -> None:
    # What a slice or a profile says is written out; only a file made to fill memory is large and empty.
    stat = path.stat()
    if stat.st_size > _LARGE and getattr(stat, "st_blocks", stat.st_size) * 512 < stat.st_size // 2:
        raise CorruptFileError(f"{path} claims {stat.st_size:,} bytes, but most of it was never written.")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
