"""SeaM: keep the weights that a mask, learned on the student's task, leaves standing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from remos_hf.fields import check_number
from remos_hf.layers import Layer
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing.competition import competing_layers
from remos_hf.slicing.ordinal import Selection
from remos_hf.slicing.rules import Rule, keep_highest
from remos_hf.strategies.short_runs import Samples, check_counts, labelled_loss, part_of, short_run, with_trained_head
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData

# Where masks start: every weight is kept, and none is given up in fewer than START / mask_rate steps.
START = 1.0


@dataclass(frozen=True)
class SeaM(SliceAndReset):
    """Learn a real number for each weight on the student's data, keep the weights of the highest numbers.

    While they learn, a weight stands if its number is above 0: the masked teacher is trained on the student's task by
    the straight-through estimator, and pays for every weight that stands. When few enough do, the others are reset,
    once, and all weights train.

    Uses poisoned data or an attack's success: no.

    Attributes:
        alpha: Weight of the kept share in the loss, at least 0.
        mask_rate: Adam's learning rate of the masks, above 0.
        steps: Most steps of the masks.
        head_steps: Steps that the head is trained before, on the frozen teacher.
        batch_size: Samples of a step of the masks.

    Source:
        Qi et al., ICSE 2023; src/defect_inherit of their repository (alpha .5, Adam at .05).
        Differs: learning stops when `slice_ratio` (1 - their threshold) or fewer are above 0, or after `steps`, and
        that share is kept whether more or fewer are above 0, so that shares can be compared; the record says how many
        were ("share_above"). Masks start at 1. Biases and norms have none. The student keeps its fresh head, as after
        every other start. Nothing is chosen on the test set; the authors take their best epoch there.
    """

    citation: ClassVar[str] = (
        "@inproceedings{qi2023reusing, title={Reusing Deep Neural Network Models through Model Re-engineering}, "
        "author={Qi, Binhang and Sun, Hailong and Gao, Xiang and Zhang, Hongyu and Li, Zhaotian and Liu, Xudong}, "
        "booktitle={ICSE}, year={2023}}"
    )

    alpha: float = 0.5
    mask_rate: float = 0.05
    steps: int = 300
    head_steps: int = 100
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        super().__post_init__()
        if self.scope != "model":
            raise ValueError(f"SeaM's masks learn over the whole model, so scope is 'model', but got {self.scope!r}.")
        check_number(self, "a weight in the loss, at least 0", lambda one: 0 <= one < float("inf"), "alpha")
        check_number(self, "a learning rate, above 0", lambda one: 0 < one < float("inf"), "mask_rate")
        check_counts(self, steps=1, head_steps=0, batch_size=1)

    def _decided_by(self, student: nn.Module, data: StudentData) -> tuple[Rule, Mapping[str, Any]]:
        """Learn the masks."""
        masks, details = self._learned(student, data)
        return mask_rule(masks), {"seam": details}

    def _learned(self, student: nn.Module, data: StudentData) -> tuple[dict[str, Tensor], dict[str, Any]]:
        seed = data.seed if self.seed is None else self.seed
        ran = data.layers_that_run(student, head=self.head, embeddings=self.embeddings)
        layers, _ = competing_layers(student, head=self.head, embeddings=self.embeddings, ran=ran)
        samples = Samples(data, next(student.parameters()).device, seed)
        asked, head_steps = with_trained_head(student, samples, steps=self.head_steps, head=self.head)
        weights = {name: asked.get_parameter(name) for name in {one.parameter_name: None for one in layers.values()}}
        masks = {name: torch.full_like(weight, START).requires_grad_(True) for name, weight in weights.items()}
        total = sum(mask.numel() for mask in masks.values())

        def masked(*args: Any, **inputs: Any) -> Any:  # noqa: ANN401 - whatever the model takes and gives
            standing = {name: weights[name] * _Above.apply(mask) for name, mask in masks.items()}
            return functional_call(asked, standing, args, inputs)

        def share_kept() -> Tensor:
            return sum(_Above.apply(mask).sum(dtype=torch.float64) for mask in masks.values()) / total

        losses = short_run(
            asked,
            samples,
            lambda batch: labelled_loss(masked, batch),
            torch.optim.Adam(list(masks.values()), self.mask_rate),
            steps=self.steps,
            batch_size=self.batch_size,
            penalty=lambda: self.alpha * share_kept(),
            until=lambda: share_kept().item() <= self.slice_ratio,
        )
        by_layer = {name: part_of(layer, masks[layer.parameter_name].detach()) for name, layer in layers.items()}
        return by_layer, {
            "steps": len(losses),
            "head_steps": head_steps,
            "share_above": share_kept().item(),
            "loss": [losses[0], losses[-1]],
        }


class _Above(torch.autograd.Function):
    """1 where a mask is above 0, else 0; the gradient goes through as it is."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        return (mask > 0).to(mask.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        return gradient


def mask_rule(masks: Mapping[str, Tensor]) -> Rule:
    """Make the rule that keeps the weights of the highest masks; `masks` by `Layer.name`."""

    def seam(layers: Sequence[Layer], statistics: CoverageProfile | None, share: float, seed: int) -> Selection:
        return keep_highest([masks[layer.name] for layer in layers], layers, share)

    return seam
