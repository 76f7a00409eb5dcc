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
            the direct children outside the head that hold parameters.

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
    found = {
        name: module
        for name, module in model.named_children()
        if name not in adapter.head and any(True for _ in module.parameters())
    }
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no child outside its head whose output is a feature. Name some: layers=(...)."
        )
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


def _distance(made: Tensor, wanted: Tensor, masks: list[Tensor]) -> Tensor:
    squares = (made - wanted).square()
    real = next((mask for mask in masks if squares.dim() == 3 and mask.shape == squares.shape[:2]), None)
    if real is None:
        return squares.mean()
    # Taken out, not multiplied: a padded position may hold anything.
    return squares.masked_fill(~real[..., None], 0).sum() / (real.sum() * squares.shape[-1]).clamp(min=1)
