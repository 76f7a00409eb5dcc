"""Prune a model to the classes that are needed: what contributes least to them goes, and stays zero while it trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.applications.mean_inputs import MeanInputs, give_mean
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.plain import Finetune
from remos_hf.training.accelerate_loop import Fitted, fit


@torch.no_grad()
def prune_outside(model: nn.Module, kept: RelevantSlice, *, means: MeanInputs | None = None) -> nn.Module:
    """Set every weight outside a slice to zero, in place.

    Args:
        model: The model that the slice was chosen of.
        kept: What stays: `highest_scoring(model, weight_scores(...), share)`.
        means: If given, what the removed weights contributed on average goes into the layer's bias, or into the
            BatchNorm that follows: `profile_mean_inputs(model, batches)`.

    Returns:
        The model.

    Raises:
        LayerMismatchError: The slice or the means are of another model.
        TeacherMismatchError: The weights are not those that the slice was chosen of.

    Source:
        NNSlicer, ESEC/FSE 2020, section 5.4; its code computes W (x - mean) + mean of what the layer made, for its own
        slices and not for all rivals.
        Differs: the mean is an option for every slice, and is folded into the model.
    """
    layers = kept.check_matches(adapter_for(model, ()).layers())
    removed = {name: layer.weight.masked_fill(kept.kept[name].to(layer.device), 0) for name, layer in layers.items()}
    if means is not None:
        give_mean(model, layers, removed, means)
    _set_zero(layers, kept)
    return model


def keep_pruned(optimizer: Optimizer, model: nn.Module, kept: RelevantSlice) -> Optimizer:
    """Have an optimizer set the weights outside a slice to zero again after each of its steps.

    Args:
        optimizer: Any optimizer of the model's parameters.
        model: The pruned model.
        kept: What it was pruned to.

    Returns:
        The optimizer.

    Raises:
        LayerMismatchError: The slice is of another model.
    """
    layers = kept.check_matches(adapter_for(model, ()).layers(), verify_teacher=False)
    gone = {name: ~kept.kept[name] for name in layers}

    @torch.no_grad()
    def set_zero(*_: object) -> None:
        for name, layer in layers.items():
            gone[name] = gone[name].to(layer.device)
            layer.weight.masked_fill_(gone[name], 0)

    optimizer.register_step_post_hook(set_zero)
    return optimizer


def fine_tune_pruned(
    model: nn.Module,
    kept: RelevantSlice,
    train_dataset: Dataset,
    *,
    optimizer: Callable[[nn.Module], Optimizer],
    **options: Any,  # noqa: ANN401 - those of fit
) -> Fitted:
    """Train a pruned model, in place, while what was removed stays zero.

    Args:
        model: The pruned model.
        kept: What it was pruned to.
        train_dataset: Samples of the target classes, as `fit` takes them.
        optimizer: Builds the optimizer from the model, likewise.
        **options: Further arguments of `fit`, as epochs, batch_size and seed.

    Raises:
        LayerMismatchError: The slice is of another model.
        ValueError: As `fit`.
    """
    return fit(
        model,
        train_dataset,
        optimizer=lambda student: keep_pruned(optimizer(student), student, kept),
        strategy=Finetune(),
        **options,
    )


def _set_zero(layers: dict, kept: RelevantSlice) -> None:
    for name, layer in layers.items():
        layer.weight.masked_fill_(~kept.kept[name].to(layer.device), 0)
