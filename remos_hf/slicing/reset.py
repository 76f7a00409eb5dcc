"""Forget the weights outside a slice, in place."""

import hashlib
from typing import Literal

import torch
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.layers import check_rankable
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
    check_rankable(layers)
    if verify_teacher:
        relevant.check_matches(adapter.layers(embeddings=True))
    for name, layer in layers.items():
        weight = layer.weight
        given_up = ~relevant.kept[name].to(weight.device)
        if to == "zero":
            weight.masked_fill_(given_up, 0)
        else:
            fresh = adapter.fresh_weight(layer, _generator(seed, name))
            weight.copy_(torch.where(given_up, fresh.to(weight), weight))
    return model


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
