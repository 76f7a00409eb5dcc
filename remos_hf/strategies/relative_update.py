"""Divmag, ReMoS's ancestor: the weights that a trial fine-tuning moves least for their size are reset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.fields import check_number
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.competition import competing_layers
from remos_hf.slicing.ordinal import Selection
from remos_hf.slicing.rules import Rule, keep_highest
from remos_hf.strategies.short_runs import Samples, check_counts, free_copy, labelled_loss, part_of, short_run
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class RelativeUpdate(SliceAndReset):
    """Fine-tune a copy for a while, and reset the weights of the smallest |w_trial - w_teacher| / |w_teacher|.

    What hardly moves for its size is a large weight that the student's task does not ask to change. The copy is thrown
    away: the student starts from the teacher's own values. A weight of 0 counts as one of `floor`.

    Uses poisoned data or an attack's success: no.

    Attributes:
        steps: Of the trial, on the samples that may be looked at before training.
        learning_rate: SGD's, momentum .9, in the trial.
        batch_size: Samples of a step.
        floor: The least that a difference is divided by, above 0.

    Source:
        The working fork that ReMoS came from (ziqi-zhang/Renofeation), fineprune/global_datasetgrad_divmag_iter.py:
        |w_trial - w| / max(|w|, low_bound), 3,000 steps, the lowest 5 % of all convolution weights.
        Differs: the trial is shorter by default, and in eval mode (statistics of norms stay). Theirs trained on
        from the trial's weights, as its way back copied an alias; their low_bound of 0 divides by zero. Linear layers
        compete too. What is frozen stays as it is in the trial.
    """

    steps: int = 300
    learning_rate: float = 1e-2
    batch_size: int = 32
    floor: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        check_number(self, "above 0", lambda one: 0 < one < float("inf"), "learning_rate", "floor")
        check_counts(self, steps=1, batch_size=1)

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[Rule, Mapping[str, Any]]:
        """Fine-tune the copy, and score the weights."""
        ran = data.layers_that_run(student, head=self.head, embeddings=self.embeddings)
        layers, _ = competing_layers(student, head=self.head, embeddings=self.embeddings, ran=ran)
        samples = Samples(data, next(student.parameters()).device, data.seed if self.seed is None else self.seed)
        trial = free_copy(student)
        trained = [trial.get_parameter(name) for name, one in student.named_parameters() if one.requires_grad]
        losses = short_run(
            trial,
            samples,
            lambda batch: labelled_loss(trial, batch),
            torch.optim.SGD(trained, self.learning_rate, momentum=0.9),
            steps=self.steps,
            batch_size=self.batch_size,
        )
        scores = {name: self._score(layer, trial) for name, layer in layers.items()}

        def relative_update(some: Sequence[Layer], _: CoverageProfile | None, share: float, seed: int) -> Selection:
            return keep_highest([scores[layer.name] for layer in some], some, share)

        return relative_update, {"relative_update": {"steps": len(losses), "loss": [losses[0], losses[-1]]}}

    def _score(self, layer: Layer, trial: nn.Module) -> Tensor:
        before = layer.weight.detach().float()
        moved = part_of(layer, trial.get_parameter(layer.parameter_name).detach()) - before
        return moved.abs() / before.abs().clamp(min=self.floor)
