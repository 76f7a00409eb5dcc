"""Hardened: perturbations shared by all inputs grow while the student trains, under true labels, at no extra pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.errors import RemosError, UnsupportedModelError
from remos_hf.perturbation import moved
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.strategies.base import Hold, Run, Strategy
from remos_hf.strategies.inserted_tokens import room_for_tokens
from remos_hf.strategies.perturbed_inputs import (
    Inputs,
    Perturbing,
    changed_embeddings,
    check_positive,
    check_share,
    embedding_rows,
    inputs_to_perturb,
    real_positions,
    with_inputs,
)
from remos_hf.strategies.short_runs import check_counts


@dataclass(frozen=True)
class Hardened(Strategy):
    """Train against a few universal perturbations that the ordinary backward pass makes worse at every step.

    To part of every batch one of the perturbations is added, and the labels stay. The backward pass that the student
    needs anyway leaves their gradient, along which each moves after the step. What turns the student on all inputs is
    so looked for and trained against; nothing is known of any trigger. On texts it was not seen to remove one.

    Of images and other floating-point inputs all values are perturbed. Into texts soft tokens are inserted at a random
    place, or with `tokens=0` a vector is added to the embedding of every real token. It starts nothing itself: put it
    behind a start, `[Subspace(), Hardened()]`.

    Attributes:
        radius: Root mean square that a perturbation's values reach at most, above 0, in the units that the model reads
            (normalised). All inputs must have one size.
        perturbations: How many are kept, at least 1.
        share: Of the samples of every batch that are perturbed, in (0, 1].
        step: Length of a perturbation's step, over the radius of its ball, above 0.
        tokens: Soft tokens inserted into a text, at least 0. What no longer fits the model's positions is cut before
            the last token; the record counts such texts (of one process).
        text_radius: The same as `radius` for each soft token, about the mean embedding, or for what is added to every
            token, about 0; over the root mean square of the vocabulary's embeddings about their mean.
        seed: Of the samples and places; the run's if None.

    Source:
        Shafahi et al. 2019 (free adversarial training: the gradient of the same backward pass) and Shafahi et al. 2020
        (universal adversarial training: one perturbation for all inputs).
        Differs: L2 steps and balls instead of signs; several perturbations; part of a batch stays clean; no batch is
        repeated.
    """

    citation: ClassVar[str] = (
        "@inproceedings{shafahi2020universal, title={Universal Adversarial Training}, author={Shafahi, Ali and Najibi, "
        "Mahyar and Xu, Zheng and Dickerson, John and Davis, Larry S. and Goldstein, Tom}, booktitle={AAAI}, "
        "year={2020}}"
    )

    radius: float = 0.19
    perturbations: int = 4
    share: float = 0.5
    step: float = 0.15
    tokens: int = 4
    text_radius: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_positive(self, "radius", "step", "text_radius")
        check_share(self)
        check_counts(self, perturbations=1, tokens=0)

    @property
    def changes_all(self) -> bool:
        """Whether no sample stays clean."""
        return self.share == 1

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Keep the perturbations while the student trains."""
        return _Universal(self, teacher)


class _Universal(Perturbing):
    outside = 2

    def __init__(self, recipe: Hardened, teacher: nn.Module) -> None:
        super().__init__(recipe.share, recipe.seed)
        self.recipe = recipe
        self.teacher: nn.Module | None = teacher  # until the perturbations have started
        # Rows of one ball each: a perturbation, or one soft token of it.
        self.rows: Tensor | None = None
        self.centre: Tensor | None = None
        self.eps, self.shape, self.cut = 0.0, (), 0

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        given = inputs_to_perturb(inputs)
        samples, count = len(given.values), self.recipe.perturbations
        hit = self.drawn(samples)
        which = torch.randint(count, (samples,), generator=self.generator)
        self._make_ready(given)
        self.teacher = None
        # A product with zeros and ones, whose gradient adds up in one order on every device.
        chosen = (functional.one_hot(which, count) * hit[:, None]).to(self.rows)
        change = chosen @ self.rows.view(count, -1)
        if not given.is_text:
            return run(with_inputs(inputs, given, given.values + change.view_as(given.values).to(given.values)))
        if not self.recipe.tokens:
            real = real_positions(inputs, given.values)[..., None]
            with changed_embeddings(model, given.values, lambda made: made + (change[:, None] * real).to(made)):
                return run(inputs)
        longer, slots = room_for_tokens(model, inputs, hit, self.recipe.tokens, self.generator)
        self.cut += slots.cut
        with changed_embeddings(model, longer["input_ids"], lambda made: slots.filled(made, change)):
            return run(longer)

    def _make_ready(self, given: Inputs) -> None:
        """Make the perturbations before the first batch, and refuse inputs of another size afterwards."""
        shape = () if given.is_text else tuple(given.values.shape[1:])
        if self.rows is None:
            self._start(shape, given)
        elif shape != self.shape:
            raise UnsupportedModelError(
                "Hardened adds the same perturbations to all inputs, so these need one size, but the first ones were "
                f"{self.shape or 'texts'}, and now came {shape or 'texts'}. Resize or crop all images to one size "
                "before they are collated."
            )
        device = given.values.device
        if self.rows.device != device or not self.rows.requires_grad:
            self.centre, self.rows = self.centre.to(device), self.rows.to(device).detach().requires_grad_()

    def _start(self, shape: tuple[int, ...], given: Inputs) -> None:
        if in_processes() and len(found := set(told_by_all(shape))) > 1:
            raise RemosError(f"Hardened adds the same perturbations to all inputs, but the processes got {found}.")
        count, tokens, self.shape = self.recipe.perturbations, self.recipe.tokens, shape
        if not given.is_text:
            self.centre = torch.zeros(given.values[0].numel())
            self.eps = self.recipe.radius * len(self.centre) ** 0.5
            self.rows = torch.zeros(count, len(self.centre))
            return
        words = embedding_rows(self.teacher).cpu()
        mean = words.mean(0)
        self.eps = self.recipe.text_radius * float((words - mean).norm(dim=1).square().mean().sqrt())
        self.centre = mean if tokens else torch.zeros_like(mean)
        self.rows = self.centre.repeat(count * max(tokens, 1), 1)
        if tokens:
            # Some words of the vocabulary, the same in every process; no step is taken from them into their balls.
            generator = torch.Generator().manual_seed(self.recipe.seed or 0)
            drawn = words[torch.randint(len(words), (len(self.rows),), generator=generator)]
            self.rows = moved(drawn, torch.zeros_like(drawn), centre=self.centre, eps=self.eps, step=0.0)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        if self.rows is None:
            return
        gradient = torch.zeros_like(self.rows) if self.rows.grad is None else self.rows.grad
        if in_processes():
            torch.distributed.all_reduce(gradient)
        step = self.recipe.step * self.eps
        self.rows = moved(self.rows, gradient, centre=self.centre, eps=self.eps, step=step).detach().requires_grad_()

    def details(self) -> dict[str, Any]:
        if self.rows is None:
            return {}
        sizes = (self.rows.detach() - self.centre).square().mean(1).sqrt()
        return {"hardened": {"root_mean_squares": [float(size) for size in sizes], "texts_cut": self.cut}}

    def state_dict(self) -> dict[str, Any]:
        kept = {"rows": self.rows, "centre": self.centre, "eps": self.eps, "shape": list(self.shape), "cut": self.cut}
        return {**super().state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rows, self.centre, self.eps, self.cut = (state[name] for name in ("rows", "centre", "eps", "cut"))
        self.shape = tuple(state["shape"])
