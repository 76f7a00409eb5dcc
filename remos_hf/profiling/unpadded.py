"""Batches without padding: samples of one length beside each other. What a layer reads of them is real everywhere."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.sequences import Sequence, with_positions
from remos_hf.profiling.batches import count_samples, take, unpacked

# Positions that are put into one batch, if no batch of the data holds more: few enough for a small machine.
_POSITIONS = 2048


def without_padding(adapter: Adapter, batches: Iterable) -> list[Any]:
    """Cut the padding out of batches, and lay samples of equal lengths together. Labels go with them.

    Samples without a real position are left out. Batches without padding, as those of images, stay as they are.

    Args:
        adapter: Of the model that reads them.
        batches: Any batches of the student's data; packed rows are taken apart.

    Raises:
        UnsupportedModelError: A mask cannot be laid on positions.
    """
    whole, pieces, most = [], {}, _POSITIONS
    for batch in unpacked(batches):
        samples, sequences = count_samples(batch), adapter.sequences(batch)
        masks = {name: one for name, one in sequences.items() if one.real is not None}
        if all(bool(one.real.all()) for one in masks.values()):
            whole.append(batch)
            continue
        most = max(most, *(one.shape.numel() for one in masks.values()))
        for piece in _cut(batch, samples, masks):
            pieces.setdefault(_shapes(piece), []).append(piece)
    return whole + [one for alike in pieces.values() for one in _joined(alike, most)]


def _cut(batch: Mapping, samples: int, masks: Mapping[str, Sequence]) -> list[Mapping]:
    """Cut a batch into its samples, each without the positions that are padding in it."""
    found = []
    for row in range(samples):
        one = take(batch, torch.tensor([row]), samples)
        for name, sequence in masks.items():
            kept = sequence.real[row].reshape(-1, sequence.shape[-1]).any(0).cpu().nonzero()[:, 0]
            if not len(kept):
                break
            one = with_positions(one, name, torch.Size((1, *sequence.shape[1:])), kept)
        else:
            found.append(one)
    return found


def _shapes(piece: Mapping) -> tuple:
    """Say which pieces can lie in one batch: those whose tensors have one shape, all of them a sample's own."""
    shapes = tuple((key, tuple(value.shape)) for key, value in piece.items() if isinstance(value, Tensor))
    own = all(isinstance(value, Tensor) and value.dim() and len(value) == 1 for value in piece.values())
    return shapes if own else (*shapes, id(piece))


def _joined(pieces: list[Mapping], most: int) -> list[Mapping]:
    positions = max(value.shape[:2].numel() for value in pieces[0].values() if isinstance(value, Tensor))
    size = max(1, most // positions)
    if len(pieces) == 1:
        return pieces
    groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
    return [{key: torch.cat([one[key] for one in some]) for key in some[0]} for some in groups]
