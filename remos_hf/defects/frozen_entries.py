"""Entries of parameters that stay as they are while a Trainer trains."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class FrozenEntries(TrainerCallback):
    """Holds entries of parameters while a Trainer trains: no gradient, weight decay or optimizer state moves them.

    A context manager: inside, gradients of held entries are zero, so that clipping does not count them; after each step
    their values are written back.

    Args:
        entries: By name, a parameter and a bool tensor of its shape, True where it is held; None holds it whole.
    """

    def __init__(self, entries: Mapping[str, tuple[nn.Parameter, Tensor | None]]) -> None:
        self._parameters = [parameter for parameter, _ in entries.values()]
        self._masks = [mask for _, mask in entries.values()]
        self._values = [_held(parameter.detach(), mask).clone() for parameter, mask in entries.values()]
        self._hooks: list[Any] = []

    def __enter__(self) -> "FrozenEntries":
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(partial(self._still, place)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _still(self, place: int, gradient: Tensor) -> Tensor:
        mask = self._masks[place]
        return torch.zeros_like(gradient) if mask is None else gradient.masked_fill(mask, 0)

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Follow the model, which the Trainer has moved to its device by now."""
        devices = [parameter.device for parameter in self._parameters]
        self._values = [values.to(device) for values, device in zip(self._values, devices, strict=True)]
        self._masks = [
            mask if mask is None else mask.to(device) for mask, device in zip(self._masks, devices, strict=True)
        ]

    @torch.no_grad()
    def on_step_end(self, *_: object, **__: object) -> None:
        """Write the held values back."""
        for parameter, mask, values in zip(self._parameters, self._masks, self._values, strict=True):
            if mask is None:
                parameter.copy_(values)
            else:
                parameter[mask] = values


def _held(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]
