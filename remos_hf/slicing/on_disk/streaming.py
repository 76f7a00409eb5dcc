"""Slice a checkpoint on disk: weights are read one at a time and written shard by shard, the model is never held.

Each pass of `choose_slice` reads a layer's weight from its file and lets go of it. The written shards are the teacher's
files, byte for byte, but for the weights outside the slice.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from remos_hf.adapters.architecture import (
    check_complete,
    check_fits,
    missing_tensors,
    on_meta,
    place_tensors,
    settled_dtype,
)
from remos_hf.adapters.base import Adapter
from remos_hf.adapters.guarded_loading import load_config, teacher_folder
from remos_hf.adapters.teacher_files import FLOATING, Checkpoint, StoredTensor, cut_short, read_values
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import COVERAGE_FILE, CoverageProfile
from remos_hf.slicing.competition import competing_layers
from remos_hf.slicing.on_disk.side_files import copy_side_file, side_files
from remos_hf.slicing.on_disk.stored import find_stored
from remos_hf.slicing.ordinal import unpack
from remos_hf.slicing.refill import parameter_generator
from remos_hf.slicing.relevant_slice import RelevantSlice, check_choice, choose_among
from remos_hf.whole import whole_folder

# Weights that are looked at or reset at once.
_PIECE = 2**20
_COPIED_BYTES = 2**22


@dataclass(frozen=True)
class Sliced:
    """A checkpoint that was sliced, and how.

    Attributes:
        relevant_slice: The weights that were kept, also written as `remos_slice.safetensors`.
        squares_reset: Share of the sum of squared weights that was given up, in [0, 1].
        seconds: Wall-clock seconds of "choose" and of "reset", which writes.
        files: What was written, relative to the folder, sorted.
    """

    relevant_slice: RelevantSlice
    squares_reset: float
    seconds: dict[str, float]
    files: list[str]


def slice_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    slice_ratio: float,
    profile: CoverageProfile | None = None,
    rule: Literal["remos", "top_magnitude", "mag_prune", "random"] = "remos",
    scope: Literal["model", "layer"] = "model",
    seed: int = 0,
    ties: Literal["mean", "artifact"] = "mean",
    reset_to: Literal["zero", "init"] = "zero",
    embeddings: bool = False,
    head: tuple[str, ...] | None = None,
    progress: bool = True,
    whole: bool = True,
) -> Sliced:
    """Choose a slice of a checkpoint and write the checkpoint with everything outside it reset.

    What comes out is what `choose_slice`, `reset_outside` and `save_pretrained` make of
    `from_pretrained(source, dtype="auto")`, bit for bit. Held at once are about one weight and the packed bits.
    Tensors outside the slice, metadata and the split into shards stay as they are, byte for byte. Configs and tokenizer
    files are copied; what they say about remote code (`auto_map`) is left out. Pickles and programs are never read.

    Args:
        source: Folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        target: Folder to write; it must not exist, or be empty. It appears whole or not at all: until then the files
            lie in a hidden folder beside it, `.<name>.partial`, which the next call clears if this one is killed.
        slice_ratio: Share of the weights to keep, in (0, 1].
        profile: Coverage of the teacher as `from_pretrained(source, dtype="auto")` loads it. Needed by "remos"; it is
            written as `remos_coverage.safetensors`.
        rule: As in `choose_slice`, like the arguments that follow.
        scope: "model" or "layer".
        seed: Seed of the random rule and of fresh values.
        ties: "mean" or "artifact".
        reset_to: "zero", or "init" for fresh values, as in `reset_outside`.
        embeddings: Without a profile, whether the rows of the input embeddings compete too.
        head: Without a profile, the modules that are never sliced; found if None.
        progress: Show bars on work longer than two seconds.
        whole: False writes into `target` itself, for a caller who lets an empty folder appear when all is there.

    Returns:
        The slice, what it gives up, and what was written.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: `source` is no folder with config.json and weights.
        FileExistsError: `target` is not empty, or another process is writing it.
        UnsupportedModelError: As `load_teacher`, or weights that this version of transformers joins, cuts or renames
            beyond recognition as it loads them.
        CorruptFileError: A shard is truncated, missing, holds a tensor twice, lies outside the folder, or was changed
            meanwhile.
        NonFiniteError: A weight is NaN or infinite, also one outside the slice: a bias, a norm.
        LayerMismatchError: The profile was taken of another architecture.
        TeacherMismatchError: The profile was taken of other weights, or in another dtype.
        RemosError: The disk is full, or something else kept the files from being written.

    Source:
        ReMoS, ICSE 2022, section 4.2. Differs: streamed.
    """
    check_choice(slice_ratio, rule, scope, ties, profile)
    if reset_to not in ("zero", "init"):
        raise ValueError(f"reset_to is 'zero' or 'init', but got {reset_to!r}.")
    source, target = Path(source), Path(target).resolve()
    _check_target(target)
    if not source.is_dir():
        raise FileNotFoundError(
            f"source is a folder with a checkpoint, but {source} is none. A repository of the Hub is fetched by "
            "huggingface_hub.snapshot_download(repo_id)."
        )
    teacher = teacher_folder(str(source))
    checkpoint, beside = teacher.checkpoint, side_files(source)

    start = time.perf_counter()
    config = load_config(teacher)
    config.dtype = settled_dtype(config, checkpoint)
    model = on_meta(config)
    placed = place_tensors(model, checkpoint)
    check_fits(model, placed)
    check_complete(model, missing_tensors(model, placed), source)
    competing, account = competing_layers(model, profile, head=head, embeddings=embeddings)
    stored = find_stored(model, competing, placed)
    relevant = choose_among(
        stored,
        profile,
        slice_ratio=slice_ratio,
        rule=rule,
        scope=scope,
        ties=ties,
        seed=seed,
        progress=progress,
        account=account,
    )
    chosen = time.perf_counter()
    adapter, counted, resets = adapter_for(model, ()), [], {}
    relevant.check_matches(adapter.layers(embeddings=True), verify_teacher=False)  # else reset_outside would refuse it
    for name, layer in stored.items():
        # Drawn for the layer on the meta device: drawing asks for the weight's shape, which must not read it.
        fresh = partial(_fresh, adapter, competing[name], seed) if reset_to == "init" else None
        same = [_Reset(relevant.kept.bits[layer.key], layer.dtype, fresh) for _ in layer.copies]
        counted.append(same[0])
        for pieces, reset in zip(layer.copies, same, strict=True):
            first = 0
            for piece in pieces:
                resets.setdefault((piece.path, piece.name), []).append(_Piece(piece, reset, first))
                first += piece.shape.numel()
    needed = checkpoint.num_bytes + sum(bits.numel() for bits in relevant.kept.bits.values())
    with _told_plainly(target), whole_folder(target) if whole else contextlib.nullcontext(target) as folder:
        _check_space(folder, target, needed)
        parameters = {(one.path, one.name) for name, _ in model.named_parameters() for one in placed.sources(name)}
        writing = _Writing(resets, parameters, progress)
        writing.write(checkpoint, folder)
        for path in (*([checkpoint.index] if checkpoint.index else []), *beside):
            copy_side_file(path, folder / path.relative_to(source))
        relevant.save_pretrained(folder)
        if profile is not None:
            profile.save(folder / COVERAGE_FILE)
        checkpoint.check_unchanged()
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lost, total = sum(reset.lost for reset in counted), sum(reset.total for reset in counted)
    seconds = {"choose": chosen - start, "reset": time.perf_counter() - chosen}
    return Sliced(relevant, lost / total if total else 0.0, seconds, files)


@dataclass
class _Reset:
    """A weight that is about to be written, and what its reset gave up."""

    bits: Tensor
    compared_as: torch.dtype
    fresh: Callable[[], Tensor] | None = None
    lost: float = 0.0
    total: float = 0.0

    def __call__(self, values: Tensor, first: int, fresh: Tensor | None) -> Tensor:
        """Reset the values that start at a place of the flattened weight, in place, and count their squares."""
        before = first % 8
        bits = self.bits[first // 8 : -(-(first + len(values)) // 8)]
        kept = unpack(bits, torch.Size([before + len(values)]))[before:]
        squares = values.to(self.compared_as).float().square()
        self.total += float(squares.sum(dtype=torch.float64))
        self.lost += float(squares.masked_fill_(kept, 0).sum(dtype=torch.float64))
        if fresh is None:
            return values.masked_fill_(~kept, 0)
        return torch.where(kept, values, fresh[first : first + len(values)].to(self.compared_as).to(values.dtype))


def _fresh(adapter: Adapter, layer: Layer, seed: int) -> Tensor:
    return adapter.fresh_weight(layer, parameter_generator(seed, layer.key)).reshape(-1)


@dataclass(frozen=True)
class _Piece:
    """A part of a stored tensor.

    Attributes:
        stored: Where it lies.
        reset: What is done to it; None if it is left as it is.
        first: The place of its first value in the flattened weight that is reset.
    """

    stored: StoredTensor
    reset: _Reset | None = None
    first: int = 0


@dataclass(frozen=True)
class _Writing:
    """How a checkpoint is written: what is reset on the way, and what has to be finite.

    Attributes:
        resets: By file and tensor, the pieces of it that are reset.
        parameters: Files and names of tensors that are parameters. Others (masks) may hold infinity, none holds NaN.
        progress: Show a bar.
    """

    resets: Mapping[tuple[Path, str], list[_Piece]]
    parameters: set[tuple[Path, str]]
    progress: bool

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write every file of weights."""
        options = {"desc": "Writing weights", "unit": "B", "unit_scale": True, "delay": 2, "leave": False}
        with tqdm(total=checkpoint.num_bytes, disable=not self.progress, **options) as bar:
            for path in checkpoint.paths:
                self.write_shard(path, folder / path.name, checkpoint.tensors_in(path), bar)

    def write_shard(self, source: Path, target: Path, tensors: list[StoredTensor], bar: tqdm) -> None:
        """Copy a file of weights, resetting some of its tensors on the way."""
        with source.open("rb") as read, target.open("xb") as write:
            for tensor in tensors:
                _copy_bytes(read, write, tensor.start - read.tell(), source, bar)
                for piece in self._pieces(tensor) if tensor.dtype in FLOATING else ():
                    self._write_piece(read, write, piece, bar)
            _copy_bytes(read, write, os.fstat(read.fileno()).st_size - read.tell(), source, bar)
            write.flush()
            os.fsync(write.fileno())

    def _pieces(self, tensor: StoredTensor) -> Iterator[_Piece]:
        """Cut a tensor into what is reset and what lies between, in order."""
        at, width = tensor.start, FLOATING[tensor.dtype].itemsize

        def untouched(stop: int) -> _Piece:
            return _Piece(replace(tensor, shape=torch.Size([(stop - at) // width]), start=at, stop=stop))

        for piece in sorted(self.resets.get((tensor.path, tensor.name), ()), key=lambda piece: piece.stored.start):
            if piece.stored.start > at:
                yield untouched(piece.stored.start)
            yield piece
            at = piece.stored.stop
        if tensor.stop > at:
            yield untouched(tensor.stop)

    def _write_piece(self, read: BinaryIO, write: BinaryIO, piece: _Piece, bar: tqdm) -> None:
        stored, reset = piece.stored, piece.reset
        fresh = reset.fresh() if reset is not None and reset.fresh is not None else None
        count = stored.shape.numel()
        for first in range(0, count, _PIECE):
            values = read_values(read, min(_PIECE, count - first), FLOATING[stored.dtype], stored.path)
            if reset is not None:
                values = reset(values, piece.first + first, fresh)
            else:
                _check_values(values, stored, (stored.path, stored.name) in self.parameters)
            bar.update(write.write(memoryview(values.view(torch.uint8).numpy())))


def _check_values(values: Tensor, tensor: StoredTensor, finite: bool) -> None:
    low, high = (float(end) for end in torch.aminmax(values))
    if low != low or (finite and not max(-low, high) < float("inf")):
        raise NonFiniteError(
            f"'{tensor.name}' in {tensor.path} holds NaN or infinity, so no student could be made of it. The teacher's "
            "checkpoint is broken or overflowed in its dtype; take a sound one."
        )


def _copy_bytes(read: BinaryIO, write: BinaryIO, count: int, source: Path, bar: tqdm) -> None:
    while count:
        block = read.read(min(count, _COPIED_BYTES))
        if not block:
            raise cut_short(source)
        write.write(block)
        bar.update(len(block))
        count -= len(block)


def _check_target(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise FileExistsError(
            f"target is a folder to be made, or an empty one, but {target} is not empty. Name another."
        )


def _check_space(folder: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RemosError(
            f"{target} needs {needed:,} bytes, but its disk has {free:,} free. Free some, or name another target."
        )


@contextlib.contextmanager
def _told_plainly(target: Path) -> Iterator[None]:
    """Say of what the system refuses where it happened and what to do."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise RemosError(
            f"{target} could not be written ({error}). Nothing was left there; free space on its disk or name another "
            "target, and slice again."
        ) from error
