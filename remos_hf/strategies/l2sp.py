"""L2-SP: the student's weights are held near the teacher's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from remos_hf.adapters.transformers_models import adapter_beside_head, adapter_for
from remos_hf.fields import check_number
from remos_hf.strategies.base import Hold, Run, Strategy, check_names

# Values that are looked at at once on the CPU: few enough to stay in its cache.
_PIECE = 2**16


@dataclass(frozen=True)
class L2SP(Strategy):
    """Fine-tuning with a spring to the teacher: alpha/2 ||w - w_teacher||^2 on the body, beta/2 ||w||^2 on the head.

    It keeps what the teacher knows, its defects included: a rival that must be beaten, and a way to forget less. After
    a strategy that gives weights up it would pull them back to the teacher's values.

    Attributes:
        alpha: Weight of the distance to the teacher, at least 0.
        beta: Weight of the head's squares, at least 0.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.

    Source:
        Li, Grandvalet and Davoine, ICML 2018, section 4 (alpha-beta L2-SP); alpha and beta as in DELTA's train.py
        (reg_l2sp), biases and norms included.
        Differs: the optimizer's weight decay is left as it is; the authors train without any, so set weight_decay=0:
        a trainer that decays warns. What does not train (frozen) is not held. A pooler that the head reads is held as
        part of the head. Renofeation's L2-SP has no 1/2, and pulls the new head to its random start.
    """

    citation: ClassVar[str] = (
        "@inproceedings{li2018explicit, title={Explicit Inductive Bias for Transfer Learning with Convolutional "
        "Networks}, author={Li, Xuhong and Grandvalet, Yves and Davoine, Franck}, booktitle={ICML}, year={2018}}"
    )
    refuses_adapters: ClassVar[str] = "it holds the model's own weights, and those stay frozen beside adapters."
    decays_itself: ClassVar[bool] = True
    refuses_computed_weights: ClassVar[str] = "it pulls the weights that train, by their names. Leave one of them out"

    alpha: float = 0.01
    beta: float = 0.01
    head: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_number(self, "a weight of the penalty, at least 0", lambda one: 0 <= one < float("inf"), "alpha", "beta")
        check_names(self, "head")

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the body's weights to the teacher's, and the head's to 0.

        Raises:
            UnsupportedModelError: The model does not say what its head is, and `head` does not either.
        """
        head = head_parameters(teacher, adapter_beside_head(teacher, self.head).head)
        return _Spring(self, {name: one for name, one in teacher.named_parameters() if name not in head}, head)


class _Spring(Hold):
    needs_teacher = True

    def __init__(self, recipe: L2SP, wanted: Mapping[str, Tensor], head: frozenset[str]) -> None:
        self.recipe, self.wanted, self.head = recipe, wanted, head

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        loss, outputs = run(inputs)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        body = {name: one for name, one in trained.items() if name in self.wanted}
        wanted = [self.wanted[name].to(one.device) for name, one in body.items()]
        head = [one for name, one in trained.items() if name in self.head]
        drift = _pull(self.recipe.alpha, list(body.values()), wanted)
        return loss + drift + _pull(self.recipe.beta, head), outputs


def _pull(weight: float, tensors: list[Tensor], wanted: list[Tensor] | None = None) -> Tensor | float:
    """Give weight/2 times the sum of squares of tensors, or of their differences from others."""
    return _Pull.apply(weight, wanted or [None] * len(tensors), *tensors) if tensors and weight else 0.0


class _Pull(torch.autograd.Function):
    """Its gradient is made piece by piece beside its value, while a piece is in the cache: memory is what it costs."""

    @staticmethod
    def forward(ctx: Any, weight: float, wanted: list[Tensor | None], *tensors: Tensor) -> Tensor:  # noqa: ANN401
        ctx.pulls, ctx.kinds, squares = [], [one.dtype for one in tensors], []
        for one, other in zip(tensors, wanted, strict=True):
            pull = torch.empty(one.shape, dtype=torch.float32, device=one.device)
            size = _PIECE if one.device.type == "cpu" else max(1, one.numel())
            pieces = [each.reshape(-1).split(size) for each in (pull, one)]
            others = [None] * len(pieces[0]) if other is None else other.reshape(-1).split(size)
            for out, mine, theirs in zip(*pieces, others, strict=True):
                away = mine.float() if theirs is None else torch.sub(mine.float(), theirs.float(), out=out)
                torch.mul(away, weight, out=out)
                squares.append(torch.linalg.vector_norm(out).square())
            ctx.pulls.append(pull)
        return torch.stack([one.to(squares[0].device) for one in squares]).sum() / (2 * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # noqa: ANN401 - torch's own
        pulls, ctx.pulls = ctx.pulls, None  # autograd may add to them in place: they are given away
        if gradient.device.type != "cpu" or gradient != 1:
            pulls = [pull.mul_(gradient.to(pull.device)) for pull in pulls]
        return None, None, *(pull.to(kind) for pull, kind in zip(pulls, ctx.kinds, strict=True))


def head_parameters(model: nn.Module, head: tuple[str, ...] | None) -> frozenset[str]:
    """Name the parameters of a model's head."""
    modules = adapter_for(model, head).head
    return frozenset(
        name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in modules)
    )
