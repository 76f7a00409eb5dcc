"""L2-SP: the student's weights are held near the teacher's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.base import Hold, Run, Strategy


@dataclass(frozen=True)
class L2SP(Strategy):
    """Fine-tuning with a spring to the teacher: alpha/2 ||w - w_teacher||^2 on the body, beta/2 ||w||^2 on the head.

    It keeps what the teacher knows, its defects included: a rival that must be beaten, and a way to forget less. After
    a strategy that gives weights up it would pull them back to the teacher's values.

    Attributes:
        alpha: Weight of the distance to the teacher, at least 0.
        beta: Weight of the head's squares, at least 0.
        head: Modules that are new; None finds them.

    Source:
        Li, Grandvalet and Davoine, ICML 2018, section 4 (alpha-beta L2-SP); alpha and beta as in DELTA's train.py.
        Differs: the optimizer's weight decay is left as it is; the authors train without any, so set weight_decay=0.
        What does not train (frozen) is not held. A pooler that the head reads is held as part of the head.
    """

    citation: ClassVar[str] = (
        "@inproceedings{li2018explicit, title={Explicit Inductive Bias for Transfer Learning with Convolutional "
        "Networks}, author={Li, Xuhong and Grandvalet, Yves and Davoine, Franck}, booktitle={ICML}, year={2018}}"
    )
    refuses_adapters: ClassVar[str] = "it holds the model's own weights, and those stay frozen beside adapters."

    alpha: float = 0.01
    beta: float = 0.01
    head: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is a weight of the penalty, at least 0, but got {getattr(self, name)}.")
        if self.head is not None:
            object.__setattr__(self, "head", tuple(self.head))

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the body's weights to the teacher's, and the head's to 0."""
        head = head_parameters(teacher, self.head)
        return _Spring(self, {name: one for name, one in teacher.named_parameters() if name not in head}, head)


class _Spring(Hold):
    needs_teacher = True

    def __init__(self, recipe: L2SP, wanted: Mapping[str, Tensor], head: frozenset[str]) -> None:
        self.recipe, self.wanted, self.head = recipe, wanted, head

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        loss, outputs = run(inputs)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        drift = [
            (one.float() - self.wanted[name].to(one.device).float()).square().sum()
            for name, one in trained.items()
            if name in self.wanted
        ]
        head = [one.float().square().sum() for name, one in trained.items() if name in self.head]
        return loss + 0.5 * (self.recipe.alpha * sum(drift) + self.recipe.beta * sum(head)), outputs


def head_parameters(model: nn.Module, head: tuple[str, ...] | None) -> frozenset[str]:
    """Name the parameters of a model's head."""
    modules = adapter_for(model, head).head
    return frozenset(
        name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in modules)
    )
