"""Renofeation: a student that starts anew and learns the teacher's features, not its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from remos_hf.activations import alter, capture
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy
from remos_hf.strategies.distillation import feature_distance, feature_modules, features_of
from remos_hf.strategies.l2sp import head_parameters
from remos_hf.strategies.norm_statistics import redo_norm_statistics
from remos_hf.strategies.plain import start_anew
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class Renofeation(Strategy):
    """Start from scratch, distil the teacher's features, and disturb that by dropout and a running average.

    Attributes:
        distance: Weight of the feature distance, at least 0: the mean squared difference of all elements of a layer,
            added up over the layers.
        head_decay: Weight of half the head's squares, at least 0.
        dropout: Probability of a whole channel (of a token's width: over all tokens) to be dropped after each layer, in
            [0, 1). The feature that is compared is that before.
        average_decay: Share of the running average that each step keeps, in [0, 1); 0 takes no average.
        layers: Modules whose outputs are compared; None finds the blocks or stages.
        head: Modules that are new; None finds them.
        seed: Seed of the fresh values; the run's if None.

    Source:
        Chin, Zhang and Marculescu, "Renofeation", CVPR Workshops 2021; train.py (weights 5 and 1e-2, dropout .1).
        Differs: parameters start as the model's own library starts them. The average is exponential over all steps; the
        authors train on from the result for 30k steps at a constant rate and average every 500th. The statistics of
        batch norms are redone without dropout. No trained 1x1 convolutions stand between the features. With long
        schedules (90k steps) it comes near fine-tuning's accuracy, with short ones it does not.
    """

    citation: ClassVar[str] = (
        "@inproceedings{chin2021renofeation, title={Renofeation: A Simple Transfer Learning Method for Improved "
        "Adversarial Robustness}, author={Chin, Ting-Wu and Zhang, Cha and Marculescu, Diana}, "
        "booktitle={CVPR Workshops}, year={2021}}"
    )
    refuses_adapters: ClassVar[str] = "it starts every weight anew, and beside adapters they would stay untrained."

    distance: float = 5.0
    head_decay: float = 0.01
    dropout: float = 0.1
    average_decay: float = 0.99
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        for name in ("distance", "head_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is a weight in the loss, at least 0, but got {getattr(self, name)}.")
        for name in ("dropout", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share, in [0, 1), but got {getattr(self, name)}.")
        for name in ("layers", "head"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Start every parameter anew, in place, by the model's own library."""
        feature_modules(adapter_for(student, self.head), self.layers)  # refused before anything is written
        start_anew(student, data.seed if self.seed is None else self.seed)
        return Preparation()

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's."""
        return _Distilled(self, student, teacher)


class _Distilled(Hold):
    needs_teacher = True

    def __init__(self, recipe: Renofeation, student: nn.Module, teacher: nn.Module) -> None:
        self.recipe, self.teacher = recipe, adapter_for(teacher, recipe.head)
        self.layers = feature_modules(self.teacher, recipe.layers)
        self.head = head_parameters(teacher, recipe.head)
        self.average: AveragedModel | None = None
        if recipe.average_decay:
            self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay))

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        if getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                "Renofeation looks at features while the student runs, and gradient checkpointing runs it a second "
                "time unseen. Train without gradient_checkpointing."
            )
        recipe = self.recipe
        wanted = features_of(self.teacher, self.layers, inputs)
        modules = {name: model.get_submodule(name) for name in self.layers}
        with capture(modules) as made, alter(modules, self._dropped):
            loss, outputs = run(inputs)
        masks = [one.real for one in self.teacher.sequences(inputs).values() if one.real is not None]
        head = [one.float().square().sum() for name, one in model.named_parameters() if name in self.head]
        added = recipe.distance * feature_distance(made, wanted, masks) + 0.5 * recipe.head_decay * sum(head)
        return loss + added, outputs

    def _dropped(self, name: str, made: Tensor) -> Tensor:
        channels = made.transpose(1, 2) if made.dim() == 3 else made  # (samples, width, positions)
        if made.dim() < 3:
            return functional.dropout(made, self.recipe.dropout)
        drop = functional.dropout1d if made.dim() == 3 else functional.dropout2d
        dropped = drop(channels, self.recipe.dropout)
        return dropped.transpose(1, 2) if made.dim() == 3 else dropped

    def after_step(self, model: nn.Module) -> None:
        if self.average is not None:
            self.average.update_parameters(model)

    @torch.no_grad()
    def finish(self, model: nn.Module, data: StudentData) -> None:
        if self.average is None or not int(self.average.n_averaged):
            return
        for parameter, average in zip(model.parameters(), self.average.module.parameters(), strict=True):
            parameter.copy_(average)
        redo_norm_statistics(adapter_for(model, self.recipe.head), data.batches(data.max_samples))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": dict(self.average.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(state["average"])
