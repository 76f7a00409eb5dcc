"""Renofeation and DELTA-R: students that start anew and learn the teacher's features, not its weights."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_avg_fn

from remos_hf.activations import alter, recomputes
from remos_hf.adapters.transformers_models import adapter_beside_head, adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy
from remos_hf.strategies.distillation import HEAD_DECAYS, HeldFeatures, check_weights, stage_modules
from remos_hf.strategies.feature_distance import MEAN_SQUARES
from remos_hf.strategies.norm_statistics import has_norm_statistics, redo_norm_statistics
from remos_hf.strategies.perturbed_inputs import check_positive
from remos_hf.strategies.plain import start_anew
from remos_hf.strategies.projector import Projector
from remos_hf.strategies.short_runs import check_counts
from remos_hf.strategies.student_data import StudentData

_CITATION = (
    "@inproceedings{chin2021renofeation, title={Renofeation: A Simple Transfer Learning Method for Improved "
    "Adversarial Robustness}, author={Chin, Ting-Wu and Zhang, Cha and Marculescu, Diana}, "
    "booktitle={CVPR Workshops}, year={2021}}"
)
_STAYS_UNTRAINED = "it starts every weight anew, and beside adapters they would stay untrained."


@dataclass(frozen=True)
class DeltaR(Strategy):
    """Start from scratch and distil the teacher's features: loss + weight * mean squared distance of each stage.

    Renofeation without its dropout and its average.

    Attributes:
        weight: Of the feature distance, at least 0: the mean squared difference of all elements of a layer, added up
            over the layers.
        head_decay: Weight of half the head's squares, at least 0.
        layers: Modules whose outputs are compared; None finds the blocks or stages.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.
        seed: Seed of the fresh values; the run's if None.

    Source:
        Chin, Zhang and Marculescu, "Renofeation", CVPR Workshops 2021 (DELTA from random weights); ReMoS, ICSE 2022,
        section 5.2 (DELTA-R); backdoor/examples/baseline/delta-r.sh of its authors' Renofeation fork (weight 5).
        Differs: parameters start as the model's own library starts them. The head's decay is train.py's 1e-2.
    """

    citation: ClassVar[str] = _CITATION
    refuses_adapters: ClassVar[str] = _STAYS_UNTRAINED
    needs_clean: ClassVar[bool] = True

    weight: float = 5.0
    head_decay: float = 0.01
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_weights(self, "weight", "head_decay")

    @property
    def refuses_computed_weights(self) -> str:
        """Why its decay of the head does nothing there."""
        return HEAD_DECAYS if self.head_decay else ""

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Start every parameter anew, in place, by the model's own library.

        Raises:
            UnsupportedModelError: The model has no such layers, or neither it nor `head` says what its head
                is; or what `Retrain` refuses.
        """
        stage_modules(adapter_beside_head(student, self.head), self.layers)  # refused before anything is written
        start_anew(student, data.seed if self.seed is None else self.seed)
        return Preparation()

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's."""
        adapter = adapter_beside_head(teacher, self.head)
        modules = stage_modules(adapter, self.layers)
        return HeldFeatures("delta_r", adapter, modules, MEAN_SQUARES, self.weight, head_decay=self.head_decay)


@dataclass(frozen=True)
class Renofeation(Strategy):
    """Start from scratch, distil the teacher's features, and disturb that by dropout and an average of the weights.

    loss + distance * sum over stages of mean (F - F_teacher)^2 + head_decay/2 ||head||^2.

    Attributes:
        distance: Weight of the feature distance, at least 0: the mean squared difference of all elements of a layer,
            added up over the layers.
        head_decay: Weight of half the head's squares, at least 0.
        dropout: Probability of a whole channel (of a token's width: over all tokens) to be dropped after each layer, in
            [0, 1). The feature that is compared is that before.
        average_decay: Share of the running average that each averaged step keeps, in [0, 1); 0 takes no average. None
            weighs all averaged steps alike (SWA, as published). A trainer that loads its best checkpoint at the end is
            refused unless it is 0: the average would overwrite it.
        average_start: Steps before the first that can be averaged.
        average_every: Of the steps after those, each how manieth is averaged; published: 500.
        norm_dropout: Whether dropout acts while the statistics of batch norms are redone, as in the authors' code.
        projector: Whether a trained linear map stands between the features of student and teacher (a bias-free 1x1
            convolution), as in the authors' ResNets. It is thrown away.
        projector_rate: Its learning rate, above 0.
        layers: Modules whose outputs are compared; None finds the blocks or stages.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.
        seed: Seed of the fresh values; the run's if None.

    Source:
        Chin, Zhang and Marculescu, "Renofeation", CVPR Workshops 2021; train.py and scripts/Renofeation.sh of
        enyac-group/Renofeation (weights 5 and 1e-2, dropout .1). `PRESETS["renofeation"]` has its two phases.
        Differs: parameters start as the model's own library starts them. By default the average is exponential over all
        steps; the authors train on at a constant rate and average every 500th. By default no projector, and no dropout
        while statistics are redone. A projector trains by SGD with momentum at a constant rate, not the student's
        optimizer. With long schedules (90k steps) it comes near fine-tuning's accuracy, with short ones it does not:
        the record counts the steps.
    """

    citation: ClassVar[str] = _CITATION
    refuses_adapters: ClassVar[str] = _STAYS_UNTRAINED
    needs_clean: ClassVar[bool] = True

    distance: float = 5.0
    head_decay: float = 0.01
    dropout: float = 0.1
    average_decay: float | None = 0.99
    average_start: int = 0
    average_every: int = 1
    norm_dropout: bool = False
    projector: bool = False
    projector_rate: float = 0.01
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_weights(self, "distance", "head_decay")
        shares = ("dropout",) if self.average_decay is None else ("dropout", "average_decay")
        check_number(self, "a share, in [0, 1)", lambda one: 0 <= one < 1, *shares)
        check_counts(self, average_start=0, average_every=1)
        check_positive(self, "projector_rate")
        self._refuse_idle()

    @property
    def refuses_computed_weights(self) -> str:
        """Why its average, and its decay of the head, do nothing right there."""
        if self.average_decay != 0:
            return "it averages the weights that train. Leave one of them out, or set its average_decay=0"
        return HEAD_DECAYS if self.head_decay else ""

    @property
    def replaces_weights(self) -> bool:
        """Whether the student is the average in the end."""
        return self.average_decay != 0

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Start every parameter anew, in place, by the model's own library.

        Raises:
            UnsupportedModelError: The model has no such layers, or no batch norm where `norm_dropout` asks for one; or
                neither it nor `head` says what its head is; or what `Retrain` refuses.
        """
        stage_modules(adapter_beside_head(student, self.head), self.layers)  # refused before anything is written
        if self.norm_dropout and not has_norm_statistics(student):
            raise UnsupportedModelError(
                f"norm_dropout says how the statistics of batch norms are redone, but {type(student).__name__} has no "
                "batch norm that keeps any. Leave it out."
            )
        start_anew(student, data.seed if self.seed is None else self.seed)
        return Preparation()

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's."""
        return _Disturbed(self, student, teacher)

    def _refuse_idle(self) -> None:
        idle = {} if self.projector else {"projector_rate": "projector=False"}
        if self.average_decay == 0:
            idle |= dict.fromkeys(("average_start", "average_every", "norm_dropout"), "average_decay=0")
        for name, why in idle.items():
            if getattr(self, name) != getattr(Renofeation, name):
                raise ValueError(f"{name}={getattr(self, name)} does nothing with {why}. Leave one of the two out.")


class _Disturbed(HeldFeatures):
    def __init__(self, recipe: Renofeation, student: nn.Module, teacher: nn.Module) -> None:
        adapter = adapter_beside_head(teacher, recipe.head)
        super().__init__(
            "renofeation",
            adapter,
            stage_modules(adapter, recipe.layers),
            MEAN_SQUARES,
            recipe.distance,
            head_decay=recipe.head_decay,
            projector=Projector(recipe.projector_rate, recipe.seed or 0) if recipe.projector else None,
        )
        self.recipe = recipe
        self.average: AveragedModel | None = None
        if recipe.average_decay != 0:
            decay = recipe.average_decay
            average = get_swa_avg_fn() if decay is None else get_ema_avg_fn(decay)
            # In float32: a step's share of an average is less than half precision can add to it.
            self.average = AveragedModel(student, avg_fn=average).float()

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        if self.recipe.dropout and recomputes(model):
            raise ValueError(
                "Renofeation drops features while the student runs, and gradient checkpointing runs it a second "
                "time without. Train without gradient_checkpointing."
            )
        return super().loss(model, inputs, run)

    def disturbed(self, modules: Mapping[str, nn.Module]) -> AbstractContextManager:
        return alter(modules, self._dropped) if self.recipe.dropout else nullcontext()

    def _dropped(self, name: str, made: Tensor) -> Tensor:
        if made.dim() < 3:
            return functional.dropout(made, self.recipe.dropout)
        axis = self.teacher.channel_axis(name, made) if made.dim() < 5 else 1
        drop = functional.dropout1d if made.dim() == 3 else functional.dropout2d
        return drop(made.movedim(axis, 1), self.recipe.dropout).movedim(1, axis)

    def after_step(self, model: nn.Module) -> None:
        super().after_step(model)
        since = self.steps - self.recipe.average_start
        if self.average is not None and since > 0 and since % self.recipe.average_every == 0:
            self.average.update_parameters(model)

    @property
    def averaged(self) -> int:
        return 0 if self.average is None else int(self.average.n_averaged)

    @torch.no_grad()
    def finish(self, model: nn.Module, data: StudentData) -> None:
        super().finish(model, data)
        if self.average is None:
            return
        if not self.averaged:
            warnings.warn(
                f"Renofeation was to average every {self.recipe.average_every} steps after "
                f"{self.recipe.average_start}, but the run had {self.steps}: the student is that of the last step. "
                "(remos_hf)",
                stacklevel=2,
            )
            return
        for parameter, average in zip(model.parameters(), self.average.module.parameters(), strict=True):
            parameter.copy_(average)
        disturb = self.recipe.norm_dropout
        modules = {name: model.get_submodule(name) for name in self.layers}
        with self.disturbed(modules) if disturb else nullcontext():
            batches = data.batches(data.max_samples)
            redo_norm_statistics(adapter_for(model, self.recipe.head), batches, dropout=disturb)

    def details(self) -> dict[str, Any]:
        return {"renofeation": {**super().details()["renofeation"], "averaged": self.averaged}}

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": dict(self.average.state_dict())}
        return {**super().state_dict(), **average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
