"""Distilled: while it trains, the student's hidden features are held to the teacher's on clean inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.activations import capture
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.base import Hold, Run, Strategy
from remos_hf.strategies.distillation import feature_modules, features_of, unexplained_share
from remos_hf.strategies.perturbed_inputs import rows_of, without_adapters


@dataclass(frozen=True)
class Distilled(Strategy):
    """Add to the loss what share of the teacher's variance the student's features miss, on the student's own data.

    It is meant to give back accuracy that a start gave up: the teacher is asked on what the data shows, and on nothing
    else. It starts nothing itself: put it behind a start, `[Subspace(), Distilled()]`. Beside `Hardened` or
    `Guided` it looks at the samples that they left clean, whatever the order of the list.

    Attributes:
        weight: Of the share in the loss, at least 0. The share is the mean squared difference over the teacher's
            variance, both of this batch, the mean over the layers: about 1 for a student that knows nothing.
        layers: Modules whose outputs are compared; None finds the blocks of a transformer, the stages of a
            convolutional net, or else the children beside the head.
        head: Modules that are new; None finds them.

    Source:
        Romero et al. 2015 (hints) for features of layers between; Jiao et al. 2020 (TinyBERT, section 3.2) for all
        blocks of a transformer.
        Differs: teacher and student have one shape, so nothing stands between their features; distances are over the
        teacher's variance, so that a weight means the same in every layer and model. The variance is the batch's, which
        costs no state: cutting a step's samples into other batches changes the loss a little.
    """

    citation: ClassVar[str] = (
        "@inproceedings{romero2015fitnets, title={FitNets: Hints for Thin Deep Nets}, author={Romero, Adriana and "
        "Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and Bengio, Yoshua}, "
        "booktitle={ICLR}, year={2015}}"
    )

    weight: float = 1.0
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is a weight in the loss, at least 0, but got {self.weight}.")
        for name in ("layers", "head"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's."""
        return _Followed(self, teacher)


class _Followed(Hold):
    needs_teacher = True

    def __init__(self, recipe: Distilled, teacher: nn.Module) -> None:
        self.weight, self.teacher = recipe.weight, adapter_for(teacher, recipe.head)
        self.layers = feature_modules(self.teacher, recipe.layers)

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        modules = {name: without_adapters(model).get_submodule(name) for name in self.layers}
        with capture(modules) as made:
            loss, outputs = run(inputs)
        _check_gradient(modules, made)
        rows = self._clean_rows()
        if rows is not None:
            if not len(rows):
                return loss, outputs
            inputs = rows_of(inputs, rows)
            made = {name: one[rows.to(one.device)] for name, one in made.items()}
        wanted = features_of(self.teacher, self.layers, inputs)
        masks = [one.real for one in self.teacher.sequences(inputs).values() if one.real is not None]
        return loss + self.weight * unexplained_share(made, wanted, masks), outputs

    def _clean_rows(self) -> Tensor | None:
        """Number the samples that no hold around this one has changed; None for all."""
        clean = [one.clean for one in self.around if one.clean is not None]
        return torch.stack(clean).all(0).nonzero().flatten() if clean else None


def _check_gradient(modules: Mapping[str, nn.Module], made: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trained and torch.is_grad_enabled() and not made[name].requires_grad:
            raise ValueError(
                f"Distilled compares features that the student makes while it trains, but those of '{name}' came "
                "without a gradient, as reentrant gradient checkpointing makes them. Train without "
                'gradient_checkpointing, or with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
