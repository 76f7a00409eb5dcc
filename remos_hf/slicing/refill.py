"""Forget the weights outside a slice, in place."""

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError
from remos_hf.layers import rankable_layers
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.slicing.relevant_slice import RelevantSlice


@torch.no_grad()
def reset_outside(
    model: nn.Module,
    relevant: RelevantSlice,
    *,
    to: Literal["zero", "init"] = "zero",
    seed: int = 0,
    verify_teacher: bool = True,
) -> nn.Module:
    """Give up the teacher's value of every weight outside the slice, in place. They train again; nothing is frozen.

    Everything is checked before the first weight is written.

    Args:
        model: The student, as it was started from the teacher, before any wrapping.
        relevant: The slice to keep.
        to: "zero", the artifact's way, or "init": what a layer that was never trained starts with.
        seed: Seed of "init". Each parameter draws by itself, so the order of layers does not matter.
        verify_teacher: Refuse a model whose sliced weights are not the teacher's, bit for bit.

    Returns:
        The model.

    Raises:
        ValueError: `to` is neither.
        LayerMismatchError: The slice names weights that the model does not have.
        TeacherMismatchError: The model's weights are not those of the slice's teacher.
        UnsupportedModelError: A weight is on the meta device, quantised or sharded.

    Source:
        ReMoS artifact, nc_weight_rank_pruner.py:155 (zero). "init" is ours.
    """
    if to not in ("zero", "init"):
        raise ValueError(f"to is 'zero' or 'init', but got {to!r}.")
    adapter = adapter_for(model, ())
    layers = relevant.check_matches(adapter.layers(embeddings=True), verify_teacher=False)
    rankable_layers(layers)
    if verify_teacher:
        relevant.check_matches(adapter.layers(embeddings=True))
    for name, layer in layers.items():
        weight = layer.weight
        given_up = ~relevant.kept[name].to(weight.device)
        if to == "zero":
            weight.masked_fill_(given_up, 0)
        else:
            fresh = adapter.fresh_weight(layer, parameter_generator(seed, name))
            weight.copy_(torch.where(given_up, fresh.to(weight), weight))
    return model


@torch.no_grad()
def reset_unseen_rows(model: nn.Module, seen: Tensor) -> int:
    """Give the embedding rows of tokens that the student's data never shows the mean of the seen rows, in place.

    Fine-tuning never reaches these rows, and no slice of the body touches them: an attack on the embedding of a rare
    word passes both. The padding row stays.

    Args:
        model: The student, before any wrapping.
        seen: Bool tensor, shape (rows,), True for the tokens of the student's data.

    Returns:
        Number of rows that were reset.

    Raises:
        LayerMismatchError: The model has another number of rows.
        ValueError: No row is seen.
    """
    embeddings = input_embeddings(model)
    rows = embeddings.weight
    if seen.shape != rows.shape[:1]:
        raise LayerMismatchError(
            f"The model has {len(rows)} embedding rows, but {tuple(seen.shape)} tokens were counted."
        )
    if not seen.any():
        raise ValueError("No token was seen, so there is no mean to reset the other rows to.")
    seen = seen.to(rows.device)
    unseen = ~seen
    if embeddings.padding_idx is not None:
        unseen[embeddings.padding_idx] = False
    rows[unseen] = rows[seen].float().mean(0).to(rows)
    return int(unseen.sum())


@torch.no_grad()
def squares_outside(model: nn.Module, relevant: RelevantSlice) -> float:
    """Measure the share of the sum of squared weights that a reset outside the slice gives up, in [0, 1].

    Rules that keep the same number of weights do not give up equally much: this is what makes them comparable.

    Args:
        model: The teacher, or the student before the reset.
        relevant: The slice.
    """
    layers = relevant.check_matches(adapter_for(model, ()).layers(embeddings=True), verify_teacher=False)
    lost = total = 0.0
    for name, layer in layers.items():
        squares = layer.weight.detach().float().square()
        lost += float(squares.masked_fill(relevant.kept[name].to(squares.device), 0).sum(dtype=torch.float64))
        total += float(squares.sum(dtype=torch.float64))
    return lost / total if total else 0.0


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Give a parameter the generator of its own that fresh values are drawn with, whatever the order of parameters."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
