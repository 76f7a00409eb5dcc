"""A batch as a model in training finds it hardest within a budget: PGD on pixels, or on a text's embeddings."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class Attack:
    """PGD from a uniform random start, by the signs of the gradient of the cross-entropy on the batch's own labels.

    Args:
        model: Tells its normalisation and the size of its embeddings, as far as it knows them.
        eps: Largest change of a pixel, from 0 to 1.
        step: Of each of the steps; that of texts is in the same ratio to their budget.
        steps: Number of steps.
        text_eps: Largest change of a value of an embedding, over the root mean square of the vocabulary's.
        normalisation: What images are normalised by, (means, deviations), one number a channel; None asks the model.

    Attributes:
        text_eps: In the embeddings' own units; 0 if the model reads no tokens.
    """

    def __init__(
        self, model: nn.Module, *, eps: float, step: float, steps: int, text_eps: float, normalisation: tuple | None
    ) -> None:
        self.eps, self.step, self.steps, self.text_eps = eps, step, steps, 0.0
        self.mean, self.std = normalisation or ((), ())
        try:
            self.text_eps = text_eps * float(embedding_rows(model).square().mean().sqrt())
        except (UnsupportedModelError, AttributeError):  # no tokens; image models of transformers embed patches
            if normalisation is None:
                try:
                    self.mean, self.std = image_input_of(model).mean, image_input_of(model).std
                except UnsupportedModelError:  # told when images come
                    pass

    @contextmanager
    def attacked(
        self,
        model: nn.Module,
        batch: Any,  # noqa: ANN401 - any batch
        generator: torch.Generator,
        share: float = 1.0,
    ) -> Iterator[Any]:
        """Give a batch that was moved against a model; it holds in the block alone.

        The model is in eval mode and its parameters still while it is searched, and as it was in the block.

        Args:
            model: A classifier, unwrapped; adapters may lie in it.
            batch: Labelled, on the model's device.
            generator: Of the random start.
            share: Of the budget, in (0, 1].

        Yields:
            The batch: images moved, or the texts as they are while the model embeds their tokens otherwise.

        Raises:
            UnsupportedModelError: The model gives no logits of shape (samples, labels), labels are no classes, or
                images come and their normalisation is not known.
            ValueError: The batch has no labels.
        """
        given, losses = inputs_to_perturb(batch), _losses(model, batch)
        if not given.is_text:
            with frozen(model):
                found = self._searched(
                    lambda point: losses(with_inputs(batch, given, point.to(given.values))),
                    given.values.float(),
                    generator,
                    self._of_pixels(given.values.float(), share),
                )
            yield with_inputs(batch, given, found.to(given.values))
            return

        def at(point: Tensor) -> Tensor:
            with changed_embeddings(model, given.values, lambda made: point.to(made)):
                return losses(batch)

        eps = share * self.text_eps
        # Padding stays.
        sizes = {"eps": eps * real_positions(batch, given.values)[..., None], "step": eps * self.step / self.eps}
        with frozen(model):
            with torch.no_grad():
                centre = token_embedding(model)(given.values).float()
            change = self._searched(at, centre, generator, sizes) - centre
        with changed_embeddings(model, given.values, lambda made: made + change.to(made)):
            yield batch

    def _of_pixels(self, pixels: Tensor, share: float) -> dict[str, Any]:
        if not self.mean or pixels.dim() != 4 or pixels.shape[1] != len(self.mean):
            raise UnsupportedModelError(
                f"The budget is in pixels, but of inputs of shape {tuple(pixels.shape)} the normalisation is not "
                f"known ({len(self.mean)} channels are). Give mean=(...) and std=(...), one number a channel."
            )
        mean, std = (torch.tensor(one).to(pixels)[:, None, None] for one in (self.mean, self.std))
        sizes = {"eps": share * self.eps / std, "step": share * self.step / std}
        return {**sizes, "low": -mean / std, "high": (1 - mean) / std}

    def _searched(
        self, objective: Objective, centre: Tensor, generator: torch.Generator, sizes: Mapping[str, Any]
    ) -> Tensor:
        start = random_start(centre, eps=sizes["eps"], generators=generator)
        return ascend(objective, centre, steps=self.steps, start=start, **sizes)


def _losses(model: nn.Module, batch: Any) -> Callable[[Any], Tensor]:  # noqa: ANN401
    labels = labels_of(batch)

    def losses(moved: Any) -> Tensor:  # noqa: ANN401
        outputs = outputs_without_labels(model, moved)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        classifies = isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] > 1
        if not classifies or labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise UnsupportedModelError(
                "Adversarial training is for classifiers: logits of shape (samples, labels), two labels or more, and "
                f"the number of one label a sample, but {type(model).__name__} gives "
                f"{getattr(logits, 'shape', type(logits).__name__)} for labels of shape {tuple(labels.shape)} "
                f"({labels.dtype})."
            )
        return functional.cross_entropy(logits.float(), labels.long(), reduction="none")

    return losses


def outputs_without_labels(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - any batch, any output
    """Run a model as its trainer does: with the adapters around it, and in the trainer's own precision."""
    adapter = adapter_for(without_adapters(model), ())
    # Mixed precision is laid on the forward of the outermost model, so the one within would run without it.
    adapter.model = model
    return adapter.forward(batch)


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
