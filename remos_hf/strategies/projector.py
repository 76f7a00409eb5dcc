"""Linear maps between a student's features and its teacher's, trained beside the student and thrown away."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remos_hf.profiling.processes import in_processes
from remos_hf.strategies.feature_distance import channel_axis

MOMENTUM = 0.9


class Projector:
    """A bias-free map from the student's channels to the teacher's, one a layer: a 1x1 convolution, or a Linear.

    It trains by SGD of its own, so that it needs no place in the student's optimizer and its gradient is of no other
    scale, whatever precision or accumulation the student trains with.

    Args:
        rate: Learning rate.
        seed: Of the maps it starts with, PyTorch's default for such layers.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.generator = rate, torch.Generator().manual_seed(seed)
        self.maps: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen = 0

    def __call__(self, made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the student's features in the teacher's channels."""
        for name, theirs in wanted.items():
            if name not in self.maps:
                self._start(name, *(one.shape[channel_axis(one)] for one in (made[name], theirs)))
            self.maps[name] = self.maps[name].to(theirs.device)
        return {name: _mapped(made[name], self.maps[name]) for name in wanted}

    def see(self, made: Mapping[str, Tensor], loss: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Take the gradient of the maps alone; those of several batches of a step are averaged.

        So are those of a step that the student skipped, as a scaler of losses does where its gradient overflows. From a
        gradient that is infinite or NaN itself it starts anew.
        """
        with torch.enable_grad():
            free = {name: one.detach().requires_grad_() for name, one in self.maps.items()}
            mapped = {name: _mapped(made[name].detach(), one) for name, one in free.items()}
            found = torch.autograd.grad(loss(mapped), list(free.values()))
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            self._sums, self._seen = {}, 0
            return
        for name, gradient in zip(free, found, strict=True):
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        self._seen += 1

    @torch.no_grad()
    def step(self, device: torch.device) -> None:
        """Take a step along what was seen, by all processes, since the last one.

        Args:
            device: Where the student lies. Processes tell each other there whether they have seen anything yet: before
                all of them have, none takes a step.
        """
        if in_processes():
            fewest = torch.tensor(len(self.maps), device=device)
            torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
            if not fewest:
                self._sums, self._seen = {}, 0
                return
        for name, one in self.maps.items():
            seen = torch.tensor(float(self._seen), device=one.device)
            gradient = self._sums.get(name, torch.zeros_like(one))
            if in_processes():
                torch.distributed.all_reduce(gradient)
                torch.distributed.all_reduce(seen)
            before = self.velocity.get(name, torch.zeros_like(one)).to(one.device)
            self.velocity[name] = MOMENTUM * before + gradient / seen.clamp(min=1)
            self.maps[name] = one - self.rate * self.velocity[name]
        self._sums, self._seen = {}, 0

    def _start(self, name: str, width: int, wanted: int) -> None:
        bound = width**-0.5
        self.maps[name] = torch.empty(wanted, width).uniform_(-bound, bound, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        """Give the maps and their velocities."""
        return {"maps": dict(self.maps), "velocity": dict(self.velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        self.maps, self.velocity = dict(state["maps"]), dict(state["velocity"])


def _mapped(feature: Tensor, weight: Tensor) -> Tensor:
    if feature.dim() == 4:
        return functional.conv2d(feature.float(), weight[:, :, None, None])
    return functional.linear(feature.float(), weight)
