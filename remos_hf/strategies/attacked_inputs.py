"""A batch as a model in training finds it hardest within a budget: PGD on pixels, or on a text's embeddings."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remos_hf.adapters.images import image_input_of
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.perturbation import Objective, ascend, frozen, random_start
from remos_hf.strategies.perturbed_inputs import (
    changed_embeddings,
    embedding_rows,
    inputs_to_perturb,
    real_positions,
    token_embedding,
    with_inputs,
    without_adapters,
)


@dataclass(frozen=True)
class Budget:
    """How far inputs may move, and in which steps.

    Attributes:
        eps: Of pixels from 0 to 1: largest change of a value.
        step: Of each of the steps; that of texts is in the same ratio to their budget.
        steps: Number of steps, after a uniform random start.
        text_eps: Of texts: largest change of a value of an embedding, in its own units.
        mean: What the model subtracts from each channel of values from 0 to 1; empty if it reads no images.
        std: What it then divides by.
    """

    eps: float
    step: float
    steps: int
    text_eps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of_pixels(self, pixels: Tensor, share: float) -> dict[str, Any]:
        """Give the sizes for normalised images, by channel, with a share of the budget."""
        if not self.mean or pixels.dim() != 4 or pixels.shape[1] != len(self.mean):
            raise UnsupportedModelError(
                f"The budget is in pixels, but of inputs of shape {tuple(pixels.shape)} the normalisation is not "
                f"known ({len(self.mean)} channels are). Give mean=(...) and std=(...), one number a channel."
            )
        mean, std = (torch.tensor(one).to(pixels)[:, None, None] for one in (self.mean, self.std))
        sizes = {"eps": share * self.eps / std, "step": share * self.step / std}
        return {**sizes, "low": -mean / std, "high": (1 - mean) / std}

    def of_embeddings(self, real: Tensor, share: float) -> dict[str, Any]:
        """Give the sizes for embeddings: padding stays."""
        eps = share * self.text_eps
        return {"eps": eps * real[..., None], "step": eps * self.step / self.eps}


def budget_of(
    model: nn.Module, *, eps: float, step: float, steps: int, text_eps: float, normalisation: tuple | None
) -> Budget:
    """Give a budget in the units of a model, which tells its own normalisation and the size of its embeddings.

    Args:
        model: The model.
        eps: As in `Budget`.
        step: As in `Budget`.
        steps: As in `Budget`.
        text_eps: Over the root mean square of the vocabulary's embeddings.
        normalisation: The means and deviations; None asks the model.
    """
    mean, std = normalisation or ((), ())
    size = 0.0
    try:
        size = float(embedding_rows(model).square().mean().sqrt())
    except (UnsupportedModelError, AttributeError):  # no texts: image models of transformers embed patches
        if normalisation is None:
            try:
                images = image_input_of(model)
                mean, std = images.mean, images.std
            except UnsupportedModelError:  # told when images come, by `Budget.of_pixels`
                pass
    return Budget(eps, step, steps, text_eps * size, tuple(mean), tuple(std))


@contextmanager
def attacked(
    model: nn.Module,
    batch: Any,  # noqa: ANN401 - any batch
    budget: Budget,
    generator: torch.Generator,
    share: float = 1.0,
) -> Iterator[Any]:
    """Give a batch moved to where the model's cross-entropy on its own labels is large; it holds in the block alone.

    The model is in eval mode and its parameters still while it is searched.

    Args:
        model: A classifier, unwrapped; adapters may lie in it. Its modes are put back before the block runs.
        batch: Labelled, on the model's device.
        budget: How far.
        generator: Of the random start.
        share: Of the budget, in (0, 1].

    Yields:
        The batch: images moved, or the texts as they are while the model embeds their tokens otherwise.

    Raises:
        UnsupportedModelError: The model gives no logits of shape (samples, labels).
        ValueError: The batch has no labels.
    """
    given, objective = inputs_to_perturb(batch), _losses(model, batch)
    if given.is_text:
        change = _change_of_embeddings(model, batch, objective, budget, generator, share)
        with changed_embeddings(model, given.values, lambda made: made + change.to(made)):
            yield batch
        return

    def at(point: Tensor) -> Tensor:
        return objective(with_inputs(batch, given, point.to(given.values)))

    with frozen(model):
        centre = given.values.float()
        found = _searched(at, centre, budget.steps, generator, budget.of_pixels(centre, share))
    yield with_inputs(batch, given, found.to(given.values))


def _losses(model: nn.Module, batch: Any) -> Callable[[Any], Tensor]:  # noqa: ANN401
    adapter, labels = adapter_for(without_adapters(model), ()), labels_of(batch)

    def losses(moved_batch: Any) -> Tensor:  # noqa: ANN401
        outputs = adapter.forward(moved_batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        if not isinstance(logits, Tensor) or logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise UnsupportedModelError(
                "Adversarial training is for classifiers: logits of shape (samples, labels) and one label a sample, "
                f"but {type(model).__name__} gives {getattr(logits, 'shape', type(logits).__name__)} for labels of "
                f"shape {tuple(labels.shape)}."
            )
        return functional.cross_entropy(logits.float(), labels.long(), reduction="none")

    return losses


def _change_of_embeddings(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: Callable[[Any], Tensor],
    budget: Budget,
    generator: torch.Generator,
    share: float,
) -> Tensor:
    tokens = inputs_to_perturb(batch).values

    def at(point: Tensor) -> Tensor:
        with changed_embeddings(model, tokens, lambda made: point.to(made)):
            return objective(batch)

    with frozen(model):
        with torch.no_grad():
            centre = token_embedding(model)(tokens).float()
        sizes = budget.of_embeddings(real_positions(batch, tokens), share)
        return _searched(at, centre, budget.steps, generator, sizes) - centre


def _searched(
    objective: Objective, centre: Tensor, steps: int, generator: torch.Generator, sizes: Mapping[str, Any]
) -> Tensor:
    start = random_start(centre, eps=sizes["eps"], generators=generator)
    return ascend(objective, centre, steps=steps, start=start, **sizes)


def labels_of(batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    """Find the labels of a batch.

    Raises:
        ValueError: It has none.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("labels", *LABEL_KEYS) if isinstance(batch.get(key), Tensor)), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if found is None:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"Inputs are attacked by their labels, but a batch of {held} has none.")
    return found
