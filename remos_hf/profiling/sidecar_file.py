"""One file beside a student: safetensors with JSON metadata and a checksum, written beside its place and renamed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from remos_hf.errors import CorruptFileError
from remos_hf.whole import replace_file


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
    path: Path, kind: str, fields: Iterable[str], *, optional: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict]:
    """Read what `write_tensors` wrote. The metadata must hold these fields, may hold the optional ones, and no other.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptFileError: The file is truncated, of another kind, lacks a field, or does not match its checksum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. A student saved by RemosTrainer has it beside its weights.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path} cannot be read as safetensors ({error}). It is truncated or broken: fetch it again."
        ) from error
    if header.get("format") != kind:
        raise CorruptFileError(
            f"{path} should have the format {kind}, but says {header.get('format', 'nothing')!r}. "
            "It is another file, or was written by another version of remos_hf."
        )
    if _checksum(tensors, header.get("metadata", "")) != header.get("checksum"):
        raise CorruptFileError(f"{path} does not match its checksum: its contents were changed after it was written.")
    metadata = json.loads(header["metadata"])
    if not isinstance(metadata, dict) or metadata.keys() - set(optional) != set(fields):
        found = sorted(metadata) if isinstance(metadata, dict) else type(metadata).__name__
        raise CorruptFileError(f"{path} should say {sorted(fields)}, but says {found}. It was not written by remos_hf.")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
