"""The two ends of the scale: keep everything the teacher knows, or nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from remos_hf.strategies.base import Batches, EmbeddingRows, Preparation, Strategy, check_embedding_rows, reset_rows


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

    def prepare(self, student: nn.Module, batches: Batches) -> Preparation:
        """Reset the unseen embedding rows, in place, if asked to."""
        return Preparation(rows_reset=reset_rows(self.embedding_rows, student, batches))


@dataclass(frozen=True)
class Retrain(Strategy):
    """Training from scratch: every parameter starts as if the teacher had never been trained. Its DIR is a floor.

    Attributes:
        seed: Seed of the fresh values.

    Source:
        ReMoS, ICSE 2022, section 5.2 (Retrain); artifact finetune.py (--reinit).
    """

    seed: int = 0

    @torch.no_grad()
    def prepare(self, student: nn.Module, batches: Batches) -> Preparation:
        """Reset all parameters and buffers in place.

        Raises:
            TypeError: A module with parameters of its own has no reset_parameters().
        """
        with _seeded(self.seed):
            if isinstance(student, PreTrainedModel):
                fresh = type(student)(copy.deepcopy(student.config))
                student.load_state_dict(fresh.state_dict())
            else:
                _reset_modules(student)
        return Preparation()


def _reset_modules(model: nn.Module) -> None:
    own = {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    unable = [name for name, module in own.items() if not hasattr(module, "reset_parameters")]
    if unable:
        raise TypeError(
            f"Retrain resets every module, but '{unable[0]}' ({type(own[unable[0]]).__name__}) has parameters and no "
            "reset_parameters(). Give it one."
        )
    for module in own.values():
        module.reset_parameters()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
