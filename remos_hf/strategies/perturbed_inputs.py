"""What of a batch a hold may perturb, in which of its samples, and the batch that the student then sees."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.activations import alter
from remos_hf.adapters.sequences import LABEL_KEYS, sequences_of
from remos_hf.errors import UnsupportedModelError
from remos_hf.fields import check_number
from remos_hf.profiling.processes import in_processes
from remos_hf.strategies.base import Hold, Strategy

# Rows of a vocabulary that say how large a token's embedding is.
_ROWS = 4096


@dataclass(frozen=True)
class Inputs:
    """The part of a batch that can be perturbed.

    Attributes:
        key: Its name in a mapping; None where the batch is a tensor or (inputs, ...).
        values: Floating point, (samples, ...); or the tokens of texts, int64, (samples, positions), whose embeddings
            are perturbed.
    """

    key: str | None
    values: Tensor

    @property
    def is_text(self) -> bool:
        """Whether the values are tokens."""
        return not self.values.is_floating_point()


def inputs_to_perturb(batch: Any) -> Inputs:  # noqa: ANN401 - any batch
    """Find what can be perturbed: `pixel_values`, else `input_ids`, else the only floating-point inputs.

    Raises:
        TypeError: There is no such tensor, or there are several.
    """
    if not isinstance(batch, Mapping):
        values = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(values, Tensor) and values.is_floating_point():
            return Inputs(None, values)
        raise TypeError(f"Floating-point inputs can be perturbed, but the batch holds {_told(values)}.")
    known = {key: one for key, one in batch.items() if isinstance(one, Tensor) and key not in LABEL_KEYS}
    floats = [key for key, one in known.items() if one.is_floating_point() and "mask" not in key]
    if "pixel_values" in floats:
        return Inputs("pixel_values", known["pixel_values"])
    tokens = known.get("input_ids")
    if tokens is not None and tokens.dim() == 2 and "pixel_values" not in known:
        return Inputs("input_ids", tokens)
    if len(floats) == 1 and tokens is None and "pixel_values" not in known:
        return Inputs(floats[0], known[floats[0]])
    came = ", ".join(f"{key}: {_told(one)}" for key, one in batch.items())
    raise TypeError(
        "A batch can be perturbed in its pixel_values (floating point), its input_ids of shape (samples, positions), "
        f"or in one floating-point tensor beside its labels, but it holds {came or 'nothing'}."
    )


def _told(value: Any) -> str:  # noqa: ANN401 - anything
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def with_inputs(batch: Any, given: Inputs, values: Tensor) -> Any:  # noqa: ANN401 - any batch
    """Give a batch with other values in the place of those that were found; the batch itself stays as it is."""
    if given.key is not None:
        return {**batch, given.key: values}
    return type(batch)([values, *batch[1:]]) if isinstance(batch, (tuple, list)) else values


def rows_of(batch: Any, rows: Tensor) -> Any:  # noqa: ANN401 - any batch
    """Give the samples of a batch whose numbers are in `rows`, int64. What has no sample axis stays whole."""
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)]
    samples = len(inputs_to_perturb(batch).values)

    def taken(one: Any) -> Any:  # noqa: ANN401 - anything
        return one[rows.to(one.device)] if isinstance(one, Tensor) and one.shape[:1] == (samples,) else one

    if isinstance(batch, Mapping):
        return {key: taken(one) for key, one in batch.items()}
    return type(batch)([taken(one) for one in batch])


class Perturbing(Hold):
    """A hold that changes some samples of every batch and keeps their labels.

    Args:
        share: Of the samples that no hold around it has changed, in (0, 1].
        seed: Of its own generator, on the CPU; each process has another one. None is 0.
    """

    outside = 1
    takes_clean = True

    def __init__(self, share: float, seed: int | None) -> None:
        rank = torch.distributed.get_rank() if in_processes() else 0
        self.share, self.generator = share, torch.Generator().manual_seed((seed or 0) + rank)

    def drawn(self, samples: int) -> Tensor:
        """Draw the samples of a batch to change: bool, (samples,), on the CPU. The others stand in `clean`."""
        free = torch.ones(samples, dtype=torch.bool)
        for one in self.around:
            free &= free if one.clean is None else one.clean
        rows = drawn_rows(free, self.share, self.generator)
        self.clean = free & ~rows
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self.generator.set_state(state["generator"])


def check_positive(recipe: Strategy, *names: str) -> None:
    """Refuse fields of a recipe that are no size above 0 and finite.

    Raises:
        ValueError: Names the first one.
    """
    check_number(recipe, "a size above 0", lambda one: 0 < one < float("inf"), *names)


def check_share(recipe: Strategy) -> None:
    """Refuse a recipe's share that is not in (0, 1]."""
    told = "the share of a batch's samples that are perturbed, in (0, 1]"
    check_number(recipe, told, lambda one: 0 < one <= 1, "share")


def drawn_rows(free: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw a share of the samples that are free, rounded up or down by chance so that the mean is the share.

    Args:
        free: Bool, (samples,), on the CPU.
        share: In [0, 1].
        generator: On the CPU.

    Returns:
        Bool, (samples,), on the CPU.
    """
    places = free.nonzero().flatten()
    count = int(len(places) * share + float(torch.rand((), generator=generator)))
    drawn = torch.zeros_like(free)
    drawn[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return drawn


def real_positions(batch: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Give which positions of a batch's tokens are real, bool, (samples, positions)."""
    found = sequences_of(batch)["input"].real
    return torch.ones_like(tokens, dtype=torch.bool) if found is None else found


def without_adapters(model: nn.Module) -> nn.Module:
    """Give the model that adapters lie around, with them inside its layers; a model without them is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_embedding(model: nn.Module) -> nn.Module:
    """Find the module that turns tokens into embeddings.

    Raises:
        UnsupportedModelError: The model does not say which it is.
    """
    owner = without_adapters(model)
    try:
        if getattr(getattr(owner, "config", None), "is_encoder_decoder", False):
            # In transformers 4 a body says which its encoder is, and not every model around it does.
            owner = (owner if hasattr(owner, "get_encoder") else owner.base_model).get_encoder()
        return owner.get_input_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"Tokens are perturbed in their embeddings, but {type(model).__name__} does not say which module makes "
            "them: it needs a get_input_embeddings(), as models of transformers have."
        ) from error


@torch.no_grad()
def embedding_rows(model: nn.Module) -> Tensor:
    """Give embeddings of tokens, at most 4,096 evenly spaced ones, in float32, (tokens, width).

    Raises:
        UnsupportedModelError: The model does not say which module makes them, or it makes them of no tokens.
    """
    embedding = token_embedding(model)
    if isinstance(embedding, nn.Conv2d):
        raise UnsupportedModelError(f"{type(model).__name__} embeds patches of images, so it has no tokens.")
    count = embedding.weight.shape[0]
    tokens = torch.linspace(0, count - 1, min(count, _ROWS), device=embedding.weight.device)
    return embedding(tokens.long()).float()


@contextmanager
def changed_embeddings(model: nn.Module, tokens: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have `change(embeddings)` take the place of a model's token embeddings while the block runs.

    Unlike `inputs_embeds` it works where forward does not take them, and leaves the tokens by which decoders find where
    a padded text ends.

    Args:
        model: The model.
        tokens: Those that the model will be given, (samples, positions). Of other tensors nothing is changed.
        change: Takes and gives (samples, positions, width).

    Raises:
        UnsupportedModelError: The model does not say which module embeds, or did not call it.
    """
    decodes, ran = getattr(getattr(model, "config", None), "is_encoder_decoder", False), []

    def changed(_: str, made: Tensor) -> Tensor:
        # An encoder comes first; its decoder may use the very module on tokens of the same shape.
        if made.shape[:2] != tokens.shape or (decodes and ran):
            return made
        ran.append(True)
        return change(made)

    with alter({"tokens": token_embedding(model)}, changed):
        yield
    if not ran:
        raise UnsupportedModelError(
            f"{type(model).__name__} did not call its input embeddings on tokens of shape {tuple(tokens.shape)}, so "
            "they cannot be perturbed."
        )
