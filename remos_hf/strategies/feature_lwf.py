"""Feature-LwF: first the head learns alone, then all of it, held to the teacher's last pooled feature."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remos_hf.activations import alter, evaluating
from remos_hf.adapters.transformers_models import adapter_beside_head
from remos_hf.profiling.processes import in_processes
from remos_hf.strategies.base import Hold, Run, Strategy
from remos_hf.strategies.distillation import HeldFeatures, check_weights, feature_modules
from remos_hf.strategies.feature_distance import POOLED_ABSOLUTE
from remos_hf.strategies.perturbed_inputs import without_adapters
from remos_hf.strategies.short_runs import check_counts
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class FeatureLwF(Strategy):
    """Fine-tune with the last pooled feature held to the teacher's: loss + weight * mean of |f - f_teacher|_1.

    Before, for `head_steps` steps, the head trains alone on the frozen body. It is not the Learning without Forgetting
    that holds the logits of an old head.

    Attributes:
        weight: Of the distance, at least 0: absolute differences of a feature averaged over positions, added up over
            its channels, the mean over samples.
        head_steps: First steps in which the head trains alone; in the paper, half of the run. A run that ends with them
            warns: its body is the teacher's.
        layers: Modules whose pooled outputs are compared; None takes the last block, stage or child before the head.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.

    Source:
        Shafahi et al., ICLR 2020, as CARTL's baseline: lwf_tl_trainer.py of NISP-official/CARTL (weights .1 to .001, 26
        of 52 epochs for the head).
        Differs: the authors store the teacher's features of inputs that were augmented once; here the teacher sees
        every batch as the student does. What stands between the last block and the pooling, as the norm and activation
        of a WideResNet, does not count. In several processes the optimizer sees gradients of 0 where it sees none
        otherwise; the body stays as it was all the same.
    """

    citation: ClassVar[str] = (
        "@inproceedings{shafahi2020adversarially, title={Adversarially Robust Transfer Learning}, author={Shafahi, Ali "
        "and Saadatpanah, Parsa and Zhu, Chen and Ghiasi, Amin and Studer, Christoph and Jacobs, David and Goldstein, "
        "Tom}, booktitle={ICLR}, year={2020}}"
    )
    needs_clean: ClassVar[bool] = True

    weight: float = 0.01
    head_steps: int = 300
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_weights(self, "weight")
        check_counts(self, head_steps=0)

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's last feature to the teacher's.

        Raises:
            UnsupportedModelError: The model does not say what its head is, and `head` does not either.
        """
        adapter = adapter_beside_head(teacher, self.head)
        found = feature_modules(adapter, self.layers)
        last = found if self.layers is not None else dict([*found.items()][-1:])
        return _HeadFirst(self, HeldFeatures("feature_lwf", adapter, last, POOLED_ABSOLUTE, self.weight))


class _HeadFirst(Hold):
    needs_teacher = True

    def __init__(self, recipe: FeatureLwF, held: HeldFeatures) -> None:
        self.recipe, self.held = recipe, held
        self.body: dict[str, Tensor] = {}

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        self.held.around = self.around
        if self.held.steps >= self.recipe.head_steps:
            return self.held.loss(model, inputs, run)
        student = without_adapters(model)
        head = [student.get_submodule(name) for name in self.held.teacher.head]
        trained = {id(one) for module in head for one in module.parameters()}
        body = {name: one for name, one in model.named_parameters() if one.requires_grad and id(one) not in trained}
        if len(body) == sum(one.requires_grad for one in model.parameters()):
            raise ValueError(
                f"FeatureLwF trains the head alone for {self.recipe.head_steps} steps, but no parameter of "
                f"{list(self.held.teacher.head)} trains. Name the new modules, head=(...), or take head_steps=0."
            )
        if not in_processes():
            with _still(model, body, head):
                return run(inputs)
        self.body = self.body or {name: one.detach().clone() for name, one in body.items()}

        def linked(_: str, made: Tensor) -> Tensor:
            # DDP waits for a gradient of every parameter that it knows: the body's are 0.
            return made + sum(0 * one.requires_grad_(True).sum() for one in body.values()).to(made.dtype)

        with _still(model, body, head), alter({"head": head[-1]}, linked):
            return run(inputs)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters()) if self.body else {}
        for name, before in self.body.items():  # an optimizer that decays weights does so at a gradient of 0 too
            parameters[name].copy_(before)
        self.held.after_step(model)
        if self.held.steps >= self.recipe.head_steps:
            self.body = {}

    def finish(self, model: nn.Module, data: StudentData) -> None:
        if 0 < self.held.steps <= self.recipe.head_steps:
            warnings.warn(
                f"FeatureLwF trained the head alone for all {self.held.steps} steps of the run (head_steps="
                f"{self.recipe.head_steps}): the student's body is the teacher's. The paper takes half of the run: "
                f"head_steps={self.held.steps // 2}. (remos_hf)",
                stacklevel=2,
            )
        self.held.finish(model, data)

    def details(self) -> dict[str, Any]:
        told = self.held.details()["feature_lwf"]
        return {"feature_lwf": {**told, "head_steps": min(self.held.steps, self.recipe.head_steps)}}

    def state_dict(self) -> dict[str, Any]:
        return self.held.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.held.load_state_dict(state)


@contextmanager
def _still(model: nn.Module, body: Mapping[str, Tensor], head: list[nn.Module]) -> Iterator[None]:
    """Keep all but the head from training, from dropping out and from counting statistics while the block runs."""
    modes = [module.training for module in head]
    for one in body.values():
        one.requires_grad_(False)
    try:
        with evaluating(model):
            for module, mode in zip(head, modes, strict=True):
                module.train(mode)
            yield
    finally:
        for one in body.values():
            one.requires_grad_(True)
