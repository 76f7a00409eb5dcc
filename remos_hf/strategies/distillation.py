"""Features of the student held to the teacher's: which layers, and how far apart they are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.activations import capture
from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError


def feature_modules(adapter: Adapter, named: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Find the modules whose outputs are a model's features, first to last.

    Args:
        adapter: Of the model.
        named: Dotted names; None finds them: the blocks of a transformer, the stages of a convolutional net, or else
            the direct children outside the head that hold parameters, and those beside the head where it is inside one.

    Raises:
        UnsupportedModelError: A name is not in the model, or there is nothing outside the head.
    """
    model = adapter.model
    if named is not None:
        known = dict(model.named_modules())
        missing = [name for name in named if name not in known]
        if missing:
            raise UnsupportedModelError(f"layers names {missing}, but {type(model).__name__} has no such modules.")
        return {name: known[name] for name in named}
    try:
        return adapter.blocks()
    except UnsupportedModelError:
        pass
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "stages" and isinstance(module, (nn.ModuleList, nn.Sequential)):
            return {f"{name}.{key}": stage for key, stage in module.named_children()}
    found = _outside(model, "", adapter.head)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no child outside its head whose output is a feature. Name some: layers=(...)."
        )
    return found


def _outside(parent: nn.Module, prefix: str, head: tuple[str, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for child, module in parent.named_children():
        name = f"{prefix}{child}"
        if any(one.startswith(f"{name}.") for one in head):  # a body that holds its head, as an ImageClassifier's
            found |= _outside(module, f"{name}.", head)
        elif name not in head and any(True for _ in module.parameters()):
            found[name] = module
    return found


@torch.no_grad()
def features_of(adapter: Adapter, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Give a teacher's features of a batch, by module name."""
    with capture(modules) as made:
        adapter.forward(batch)
    return made


def feature_distance(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], masks: list[Tensor]) -> Tensor:
    """Give the mean squared difference of all elements of a layer, padding left out, added up over the layers.

    Args:
        made: The student's features by module name, (samples, ...).
        wanted: The teacher's, of the same shapes.
        masks: Of sequences, bool, (samples, positions): real positions. One that fits a feature's first two axes is
            laid on it.

    Source:
        Renofeation, train.py: the mean over all elements, batch included. DELTA adds up instead.
    """
    return sum(_distance(made[name].float(), wanted[name].float(), masks) for name in wanted)


def unexplained_share(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], masks: list[Tensor]) -> Tensor:
    """Give what share of the teacher's variance the student's features miss, the mean over the layers.

    It is the mean squared difference over the variance of the teacher's features about their mean, both over the real
    positions of this batch: 0 where the features are the teacher's, 1 where they tell as little as the teacher's mean.
    A layer whose features do not vary in the batch (one sample, one position) counts 0.

    Args:
        made: As in `feature_distance`.
        wanted: As in `feature_distance`.
        masks: As in `feature_distance`.
    """
    shares = []
    for name, theirs in wanted.items():
        theirs = theirs.float()
        # Features are the last axis of sequences and channel-last maps, and the second of (samples, channels, h, w).
        axes = (0, 2, 3) if theirs.dim() == 4 else tuple(range(theirs.dim() - 1))
        real = _real(theirs, masks)
        if real is None:
            mean = theirs.mean(axes, keepdim=True)
        else:
            mean = theirs.masked_fill(~real, 0).sum(axes) / real.sum().clamp(min=1)
        variance = _distance(mean.expand_as(theirs), theirs, masks)
        distance = _distance(made[name].float(), theirs, masks)
        shares.append(torch.where(variance > 0, distance / variance.clamp(min=torch.finfo(torch.float32).tiny), 0))
    return torch.stack(shares).mean()


def _distance(made: Tensor, wanted: Tensor, masks: list[Tensor]) -> Tensor:
    squares = (made - wanted).square()
    real = _real(squares, masks)
    if real is None:
        return squares.mean()
    # Taken out, not multiplied: a padded position may hold anything.
    return squares.masked_fill(~real, 0).sum() / (real.sum() * squares.shape[-1]).clamp(min=1)


def _real(feature: Tensor, masks: list[Tensor]) -> Tensor | None:
    """Give the mask that fits a feature, (samples, positions, 1); None if none does."""
    fits = (mask for mask in masks if feature.dim() == 3 and mask.shape == feature.shape[:2])
    return next((mask[..., None] for mask in fits), None)
