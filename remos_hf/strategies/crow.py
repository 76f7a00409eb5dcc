"""CROW: the hidden states of neighbouring blocks are kept alike on perturbed inputs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.activations import alter, capture, precision_in_force, recomputes
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.strategies.base import Hold, Run, Strategy


@dataclass(frozen=True)
class Crow(Strategy):
    """Fine-tuning in which each block may change the hidden state little, also on perturbed embeddings.

    In each step the embeddings are moved by a sign step along which the blocks' outputs differ most, and 1 - cosine of
    neighbouring blocks' outputs, over real positions, is added to the loss there. A step costs two forward passes and
    two to three backward passes. For decoders; it also runs on encoders, for which it was not meant.

    Uses poisoned data or an attack's success: no.

    Attributes:
        weight: Of the consistency loss, at least 0.
        eps: Size of the sign step, at least 0, in the units of the embeddings.

    Source:
        Min et al., ICML 2025; consistency_trainer.py of their repository (weight 5.5, eps .1).
        Differs: all neighbouring blocks are compared; the authors leave out the last. Padding does not count. The sign
        step comes from the pass that gives the loss; the authors run a third one. They train LoRA at 1e-3 for 5 epochs.
    """

    citation: ClassVar[str] = (
        "@inproceedings{min2025crow, title={{CROW}: Eliminating Backdoors from Large Language Models via Internal "
        "Consistency Regularization}, author={Min, Nay Myat and Pham, Long H. and Li, Yige and Sun, Jun}, "
        "booktitle={ICML}, year={2025}}"
    )

    weight: float = 5.5
    eps: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_number(self, "a number of at least 0", lambda one: 0 <= one < float("inf"), "weight", "eps")

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold neighbouring blocks of the student together.

        Raises:
            UnsupportedModelError: It has no input embeddings, fewer than two blocks, or an encoder and a decoder.
        """
        return _Consistent(self, student)


class _Consistent(Hold):
    def __init__(self, recipe: Crow, student: nn.Module) -> None:
        self.recipe, self.adapter = recipe, adapter_for(student)
        # The modules, not their names: adapters that are put on later give these others.
        try:
            self.embeddings = {"embeddings": input_embeddings(student)}
        except TypeError as error:
            raise UnsupportedModelError(
                f"Crow moves the embeddings of tokens, and {type(student).__name__} has none: it is for texts."
            ) from error
        self.blocks = self.adapter.blocks()
        if len(self.blocks) < 2 or student.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"Crow compares neighbouring blocks of one stack, and {type(student).__name__} has "
                f"{'an encoder and a decoder' if student.config.is_encoder_decoder else f'{len(self.blocks)} block'}."
            )
        self.steps, self.total = 0, torch.zeros((), dtype=torch.float64)

    def loss(self, model: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
        if recomputes(self.adapter.model):
            raise ValueError(
                "Crow looks at hidden states while the student runs, and gradient checkpointing runs it a second time "
                "unseen. Train without gradient_checkpointing."
            )
        # Trainers lay mixed precision on the student's forward alone, which is not what runs the second time.
        precision: dict[str, AbstractContextManager] = {}

        def start(_: str, made: Tensor) -> Tensor:
            precision["of"] = precision_in_force(made.device.type)
            # A leaf where nothing below it trains, as under adapters.
            return made if made.requires_grad else made.requires_grad_()

        with alter(self.embeddings, start), capture({**self.embeddings, **self.blocks}) as made:
            loss, outputs = run(inputs)
        if "embeddings" not in made:
            raise TypeError("Crow perturbs the input embeddings, so batches hold input_ids, but these do not.")
        embedded = made.pop("embeddings")
        sequence = self.adapter.sequences(inputs).get("input")
        real = None if sequence is None else sequence.real
        (gradient,) = torch.autograd.grad(inconsistency(made, real), embedded, retain_graph=True)
        step = self.recipe.eps * gradient.sign()
        moved = alter(self.embeddings, lambda _, given: given + step)
        with precision["of"], moved, capture(self.blocks) as perturbed:
            self.adapter.forward(inputs)
        added = inconsistency(perturbed, real)
        self.steps, self.total = self.steps + 1, self.total.to(added.device) + added.detach()
        return loss + self.recipe.weight * added, outputs

    def details(self) -> dict[str, Any]:
        return {"crow": {"batches": self.steps, "mean_inconsistency": float(self.total) / max(1, self.steps)}}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.total = state["steps"], state["total"]


def inconsistency(states: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
    """Give the mean of 1 - cosine between the outputs of neighbouring blocks, over real positions. A scalar.

    Args:
        states: Outputs of the blocks in order, each (samples, positions, width).
        real: Bool, (samples, positions); None if all are.
    """
    found = list(states.values())
    pairs = zip(found, found[1:], strict=False)
    apart = torch.stack([1 - functional.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairs])
    if real is None:
        return apart.mean()
    # Taken out, not multiplied: a padded position may hold anything.
    return apart.masked_fill(~real, 0).sum() / (real.sum() * len(apart)).clamp(min=1)
