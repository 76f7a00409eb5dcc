"""Weights that a module computes from others while it trains: of a set operator norm, or times a number.

Outside, all of it is an ordinary module: its state dict holds the weights that it computes with under their plain
names, and takes such; `baked` leaves them in the module.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMED = (nn.Linear, Conv1D, *CONVOLUTIONS)


class OperatorNorm(nn.Module):
    """Gives beta * W / sigma(W), by power iteration on vectors that go on from step to step.

    Args:
        layer: A module of `NORMED`.
        beta: What the operator norm becomes.
        size: Shape of what a convolution reads, (channels, ...): sigma is that of the operator on such maps. None: of
            the kernel as a matrix (outputs, inputs * positions), which the operator's may exceed.
        generator: Of the first vector.
    """

    def __init__(self, layer: nn.Module, beta: float, size: tuple[int, ...] | None, generator: torch.Generator) -> None:
        super().__init__()
        self.beta, weight = beta, layer.weight.detach()
        # Not a module of this one: the layer holds this one already.
        object.__setattr__(self, "layer", layer)
        self.exact = size is not None and isinstance(layer, CONVOLUTIONS)
        shape = (1, *size) if self.exact else (weight.flatten(1).shape[1],)
        start = torch.randn(shape, generator=generator).to(weight.device)
        # Kept by the hold, not by the model's own files.
        self.register_buffer("given", start / start.norm(), persistent=False)
        self.register_buffer("made", self._applied(weight.float(), self.given), persistent=False)
        self.settle(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Give the weight that is computed with, of the weight's shape and dtype."""
        return (weight * (self.beta / self.sigma(weight))).to(weight.dtype)

    def plain(self, value: Tensor) -> Tensor:
        """Give a weight of which `forward` makes this one, up to what sigma is off."""
        return value

    def sigma(self, weight: Tensor) -> Tensor:
        """Give the estimate of the operator norm, a scalar in float32, with its gradient."""
        # Copies: whoever runs the model twice before going backward iterates in between.
        found = (self.made.clone() * self._applied(weight.float(), self.given.clone())).sum()
        return found.clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Take one step of the power iteration, in place."""
        weight = weight.float()
        with torch.enable_grad():
            given = self.given.clone().requires_grad_()
            back = torch.autograd.grad(self._applied(weight.detach(), given), given, self.made)[0]
        self.given.copy_(functional.normalize(back.flatten(), dim=0).view_as(back))
        made = self._applied(weight, self.given)
        self.made.copy_(functional.normalize(made.flatten(), dim=0).view_as(made))

    @torch.no_grad()
    def settle(self, weight: Tensor, most: int = 500) -> None:
        """Iterate until sigma rises by less than a millionth."""
        before = 0.0
        for _ in range(most):
            self.iterate(weight)
            now = float(self.sigma(weight))
            if now <= before * (1 + 1e-6):
                return
            before = now

    def _applied(self, weight: Tensor, given: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            # The layer's own method, so that strides, groups and any padding are its own.
            return self.layer._conv_forward(given, weight, None) if self.exact else weight.flatten(1) @ given


class Times(nn.Module):
    """Gives W * factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        """Give the weight that is computed with."""
        return weight * self.factor

    def plain(self, value: Tensor) -> Tensor:
        """Give the weight of which `forward` makes this one."""
        return value / self.factor


def computed(module: nn.Module, name: str, by: nn.Module) -> None:
    """Have a module compute one of its parameters, in place; of several, the latest computes last."""
    if not parametrize.is_parametrized(module):
        module.register_state_dict_post_hook(_give_plain)
        module.register_load_state_dict_pre_hook(_take_plain)
        module.__dict__["plain_order"] = tuple(module._parameters)
    parametrize.register_parametrization(module, name, by, unsafe=True)


def all_computed(model: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Find what computes the parameters of a model, by the parameters' plain names."""
    return {
        f"{name}.{parameter}".lstrip("."): each
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for parameter, each in module.parametrizations.items()
    }


def baked(model: nn.Module) -> None:
    """Leave in every module the values that it computes with, in place; its parameters are the same objects."""
    for name in all_computed(model):
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
        if not parametrize.is_parametrized(module):  # parameters stand in their order again, as files list them
            for one in module.__dict__.pop("plain_order"):
                module._parameters[one] = module._parameters.pop(one)


def kept_state(model: nn.Module) -> dict[str, Any]:
    """Give what computes a model's parameters, by plain name: what its state dict does not tell."""
    kept = {}
    for name, each in all_computed(model).items():
        vectors = {key: value for one in each for key, value in one.named_buffers()}
        kept[name] = {"original": each.original, **vectors}
    return kept


def go_on_from(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take what `kept_state` gave. The next state dict that is loaded is the one beside it, and changes none of it."""
    for name, each in all_computed(model).items():
        values = dict(state[name])
        # Loading the model's own state dict comes after this, and would write what is computed over it.
        object.__setattr__(each, "kept", values.pop("original"))
        for one in each:
            for key, buffer in one.named_buffers():
                buffer.copy_(values[key])


@torch.no_grad()
def _give_plain(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:  # noqa: ANN401 - torch's own
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:
            state.pop(f"{prefix}parametrizations.{name}.original", None)
            state[prefix + name] = getattr(module, name).detach()


@torch.no_grad()
def _take_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:  # noqa: ANN401 - torch's own
    if not parametrize.is_parametrized(module):
        return
    for name, each in module.parametrizations.items():
        value, kept = state.pop(prefix + name, None), each.__dict__.pop("kept", None)
        for one in reversed(each):
            value = None if value is None else one.plain(value)
        if value is not None:
            state[f"{prefix}parametrizations.{name}.original"] = value if kept is None else kept
