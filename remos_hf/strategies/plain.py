"""The two ends of the scale: keep everything the teacher knows, or nothing."""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from remos_hf.errors import UnsupportedModelError
from remos_hf.randomness import seeded
from remos_hf.strategies.base import EmbeddingRows, Preparation, Strategy, check_embedding_rows, reset_rows
from remos_hf.strategies.student_data import StudentData


@dataclass(frozen=True)
class Finetune(Strategy):
    """Plain fine-tuning: the student inherits the teacher whole.

    Attributes:
        embedding_rows: "keep", or "mean" to give up the embedding rows of tokens that the student's data never shows.
    """

    embedding_rows: EmbeddingRows = "keep"

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_embedding_rows(self.embedding_rows)

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Reset the unseen embedding rows, in place, if asked to."""
        return Preparation(rows_reset=reset_rows(self.embedding_rows, student, data))


@dataclass(frozen=True)
class Retrain(Strategy):
    """Training from scratch: every parameter starts as if the teacher had never been trained. Its DIR is a floor.

    A model of transformers is built anew from its config. In any other, modules reset themselves (`reset_parameters`),
    and what owns parameters without being able to is started by its library (`init_weights`, as timm's ViT does for its
    class token and position embedding). Nothing else counts as fresh, and a model of which any parameter is left is
    refused, as is one with a frozen parameter that would change.

    Attributes:
        seed: Seed of the fresh values; the run's if None.

    Source:
        ReMoS, ICSE 2022, section 5.2 (Retrain); artifact finetune.py (--reinit).
    """

    seed: int | None = None

    def prepare(self, student: nn.Module, data: StudentData) -> Preparation:
        """Reset all parameters and buffers in place.

        Raises:
            TypeError: A module has parameters of its own that neither it nor its library starts anew. The student is
                left whole, as it is below.
            UnsupportedModelError: Its config makes other parameters than it has, or one that would change is frozen.
        """
        start_anew(student, data.seed if self.seed is None else self.seed)
        return Preparation()


@torch.no_grad()
def start_anew(student: nn.Module, seed: int) -> None:
    """Give every parameter and buffer a fresh value, in place, as the model's own library starts it.

    Raises:
        TypeError: A module has parameters of its own that neither it nor its library starts anew. The student is left
            whole, as it is below.
        UnsupportedModelError: Its config makes other parameters than it has, or one that would change is frozen, so
            that it would stay as it is drawn.
    """
    with seeded(seed):
        if isinstance(student, PreTrainedModel):
            fresh = type(student)(copy.deepcopy(student.config))
            _check_alike(student, fresh)
        else:
            fresh = _started_anew(student)
    frozen = {name: one for name, one in student.named_parameters() if not one.requires_grad}
    random = [name for name, one in frozen.items() if not torch.equal(fresh.get_parameter(name).to(one), one)]
    if random:
        raise UnsupportedModelError(
            f"Every parameter is to start anew, but {len(random)} are frozen, the first of them '{random[0]}', and "
            "would stay as drawn. Set requires_grad on them, or take a strategy that keeps the teacher's weights."
        )
    student.load_state_dict(fresh.state_dict())


def _check_alike(student: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Refuse a student that is not what its config makes, as after a head was replaced by hand."""
    made, held = ({name: tuple(one.shape) for name, one in of.state_dict().items()} for of in (fresh, student))
    other = next((name for name in {**held, **made} if held.get(name) != made.get(name)), None)
    if other is None:
        return
    of_config = f"makes it {made[other]}" if other in made else "makes none"
    raise UnsupportedModelError(
        f"Every parameter is to start anew, as the config of {type(student).__name__} says, but '{other}' is "
        f"{held.get(other, 'not in the student')}, and the config {of_config}. Change the config with the model: it "
        f"says num_labels={getattr(student.config, 'num_labels', None)}."
    )


def _started_anew(model: nn.Module) -> nn.Module:
    """Give a copy of a model, fresh; the global generator is drawn from."""
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)  # whatever was not written, or was made from its old value, shows
    own = [module for module in fresh.modules() if any(True for _ in module.parameters(recurse=False))]
    for module in own:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for module in reversed(own):  # what a parent starts, it starts after its children
        if not hasattr(module, "reset_parameters") and _starts_itself(module):
            module.init_weights()
    left = [name for name, parameter in fresh.named_parameters() if parameter.isnan().any()]
    if left:
        owner = left[0].rpartition(".")[0]
        raise TypeError(
            f"Every parameter is to start anew, but nothing gives '{left[0]}' a fresh value: '{owner}' "
            f"({type(fresh.get_submodule(owner)).__name__}) has no reset_parameters() and no init_weights() that does. "
            "Give it one."
        )
    return fresh


def _starts_itself(module: nn.Module) -> bool:
    start = getattr(module, "init_weights", None)
    if not callable(start):
        return False
    parameters = inspect.signature(start).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(one.default is not inspect.Parameter.empty or one.kind in kinds for one in parameters)
