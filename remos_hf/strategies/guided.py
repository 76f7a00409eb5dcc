"""Guided: the student trains on inputs that the teacher's own gradient has moved, under their true labels."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.activations import watch
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.base import Hold, Run, Strategy, check_names
from remos_hf.strategies.perturbed_inputs import (
    Perturbing,
    changed_embeddings,
    check_positive,
    check_share,
    embedding_rows,
    inputs_to_perturb,
    real_positions,
    rows_of,
    with_inputs,
)


@dataclass(frozen=True)
class Guided(Strategy):
    """Train on inputs moved by one sign step that moves the teacher's penultimate feature in a random direction.

    Labels stay: what easily moves the teacher, the student learns to pass over. It starts nothing itself: put it behind
    a start, `[Subspace(), Guided()]`.

    Attributes:
        radius: Size of the step in every value, above 0: of images in the units that the model reads (normalised), of
            texts over the root mean square of the vocabulary's embeddings.
        share: Of the samples of every batch that are moved, in (0, 1].
        head: Modules that are new; None finds them.
        seed: Of the samples and directions; the run's if None.

    Source:
        This project; a step of the fast method (Goodfellow et al. 2015) on the objective of penultimate-guided inputs
        (Rezaei and Liu 2020, which the ReMoS artifact's eval_robustness.py follows), with another random direction for
        each sample in place of a target.
    """

    citation: ClassVar[str] = (
        "@inproceedings{rezaei2020target, title={A Target-Agnostic Attack on Deep Models: Exploiting Security "
        "Vulnerabilities of Transfer Learning}, author={Rezaei, Shahbaz and Liu, Xin}, booktitle={ICLR}, year={2020}}"
    )

    radius: float = 0.19
    share: float = 0.5
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_positive(self, "radius")
        check_share(self)
        check_names(self, "head")

    @property
    def changes_all(self) -> bool:
        """Whether no sample stays clean."""
        return self.share == 1

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Move inputs by the teacher's gradient while the student trains."""
        return _Moved(self, teacher)


class _Moved(Perturbing):
    needs_teacher = True

    def __init__(self, recipe: Guided, teacher: nn.Module) -> None:
        super().__init__(recipe.share, recipe.seed)
        self.radius, self.teacher = recipe.radius, adapter_for(teacher, recipe.head)
        self.feature = {"feature": teacher.get_submodule(self.teacher.feature_layer())}
        self.text_scale: float | None = None

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        given = inputs_to_perturb(inputs)
        rows = self.drawn(len(given.values)).nonzero().flatten()
        if not len(rows):
            return run(inputs)
        signs = self._signs(rows_of(inputs, rows))
        change = signs.new_zeros((len(given.values), *signs.shape[1:]))
        change[rows.to(change.device)] = self.radius * signs
        if not given.is_text:
            return run(with_inputs(inputs, given, given.values + change))
        if self.text_scale is None:
            self.text_scale = float(embedding_rows(self.teacher.model).square().mean().sqrt())
        with changed_embeddings(model, given.values, lambda made: made + self.text_scale * change.to(made)):
            return run(inputs)

    @torch.enable_grad()
    def _signs(self, batch: Any) -> Tensor:  # noqa: ANN401 - any batch
        """Give the signs of the gradient of the teacher's feature along random directions, of the inputs' shape."""
        given, leaves, features = inputs_to_perturb(batch), [], []

        def leaf(values: Tensor) -> Tensor:
            leaves.append(values.detach().requires_grad_())
            return leaves[-1]

        with watch(self.feature, lambda _, read, __: features.append(read)):
            if given.is_text:
                with changed_embeddings(self.teacher.model, given.values, leaf):
                    self.teacher.forward(batch)
            else:
                self.teacher.forward(with_inputs(batch, given, leaf(given.values)))
        feature = features[-1].float()
        one_for_all = (1,) if feature.dim() == 3 else feature.shape[1:-1]  # positions move in one direction
        direction = torch.randn((len(feature), *one_for_all, feature.shape[-1]), generator=self.generator)
        along = feature * direction.to(feature)
        real = real_positions(batch, given.values) if given.is_text else None
        if real is not None and real.shape == along.shape[:-1]:
            along = along.masked_fill(~real[..., None], 0)
        signs = torch.autograd.grad(along.sum(), leaves[0])[0].sign()
        return signs if real is None else signs * real[..., None]
