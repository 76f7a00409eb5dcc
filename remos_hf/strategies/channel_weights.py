"""How much each channel of a layer matters to a task: what its loss gains when the channel is silent."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from remos_hf.activations import alter, capture, evaluating
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.profiling.batches import count_samples
from remos_hf.strategies.short_runs import Samples, labelled_loss, together

logger = logging.getLogger(__name__)

# Silenced copies that run at once hold about so many values of the layer that is silenced.
_VALUES_AT_ONCE = 2**22


def weights_of_channels(importance: Tensor) -> Tensor:
    """Give weights of the mean 1 that grow with importance: C * softmax(z / 5), z standardised over the layer.

    Args:
        importance: Of the channels of a layer, (channels,). Channels that do not differ get the same weight.

    Source:
        DELTA, train.py (the softmax, and the factor C beside the sum over channels).
    """
    spread = importance.std(correction=0)
    z = (importance - importance.mean()) / spread if spread > 0 else torch.zeros_like(importance)
    return len(importance) * (z / 5).softmax(0)


def loss_when_silenced(
    model: nn.Module, modules: Mapping[str, nn.Module], samples: Samples, size: int
) -> dict[str, Tensor]:
    """Give the mean loss with each channel of a layer's output set to 0, one at a time.

    The copies of a batch with different channels silenced run at once, and what comes before the layer runs once for
    all of them.

    Args:
        model: A copy of the teacher, with a trained head.
        modules: The layers, by their dotted names in it.
        samples: Labelled data.
        size: About how many samples, over all processes.

    Returns:
        By layer, (channels,), on the CPU; the same on all processes.

    Raises:
        NonFiniteError: A loss is NaN or infinite.
        ValueError: No process has a sample, or samples have no labels.

    Source:
        DELTA, channel_eval.py, which runs the whole net once for every filter and batch. A loss less that of the whole
        net is the increase; z-scores of both are the same.
    """

    def silenced(batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any batch
        with capture(modules) as made:
            labelled_loss(model, batch)
        axes = {name: adapter.channel_axis(name, feature) for name, feature in made.items()}
        return {name: _without_each(model, batch, modules[name], one, axes[name]) for name, one in made.items()}

    adapter = adapter_for(model, ())

    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return _mean_over(samples, size, silenced)


def _without_each(model: nn.Module, batch: Any, module: nn.Module, feature: Tensor, axis: int) -> Tensor:  # noqa: ANN401
    """Give the loss without each channel, on this axis, of a module's output like `feature`: (channels,)."""
    shape = [-1 if one == axis else 1 for one in range(feature.dim())]
    numbers = torch.arange(feature.shape[axis], device=feature.device)

    def loss(silent: Tensor) -> Tensor:
        heard = (numbers != silent).view(shape)
        with alter({"": module}, lambda _, output: output * heard.to(output.dtype)):
            return labelled_loss(model, batch)

    try:
        return vmap(loss, chunk_size=max(1, _VALUES_AT_ONCE // feature.numel()))(numbers)
    except RuntimeError as error:  # what is computed in place, or looks at values, does not run in copies
        kind = type(model).__name__
        logger.warning("Channels of a %s in %s are silenced one by one, slowly: %s", type(module).__name__, kind, error)
        return torch.stack([loss(one) for one in numbers])


def loss_by_gradient(
    model: nn.Module, modules: Mapping[str, nn.Module], samples: Samples, size: int
) -> dict[str, Tensor]:
    """Estimate what each channel's silence adds to the mean loss by its activation times the loss's gradient there.

    The first order of `loss_when_silenced`, whose arguments it takes, at the price of one backward pass a batch.

    Source:
        Molchanov et al. 2017 (the Taylor criterion of channels), with its sign.
    """

    def estimated(batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any batch
        free: dict[str, Tensor] = {}

        def with_leaf(name: str, output: Tensor) -> Tensor:
            free[name] = torch.zeros_like(output, requires_grad=True)
            return output + free[name]

        with alter(modules, with_leaf), capture(modules) as made:
            loss = labelled_loss(model, batch)
        # What the loss does not read adds nothing to it.
        gradients = [torch.zeros_like(one) for one in free.values()]
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True, materialize_grads=True)
        products = {name: -made[name].detach() * one for name, one in zip(free, gradients, strict=True)}
        axes = {name: adapter.channel_axis(name, one) for name, one in products.items()}
        return {name: one.movedim(axes[name], 0).flatten(1).sum(1) for name, one in products.items()}

    adapter = adapter_for(model, ())
    with evaluating(model), torch.enable_grad():
        return _mean_over(samples, size, estimated)


def _mean_over(samples: Samples, size: int, of_batch: Callable[[Any], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Give the mean over the samples of all processes of what is a mean over a batch's; on the CPU."""

    def sums() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"rows": torch.tensor(0.0, dtype=torch.float64)}
        for batch in samples.some(size):
            for name, one in {"rows": torch.ones(()), **of_batch(batch)}.items():
                found[name] = found.get(name, 0) + count_samples(batch) * one.double().cpu()
        return found

    found = together(sums, samples.device)
    rows = float(found.pop("rows"))
    if not rows:
        raise ValueError("There is no sample to weigh channels by. Pass the student's training data, with labels.")
    means = {name: (one / rows).float() for name, one in found.items()}
    broken = next((name for name, one in means.items() if not bool(one.isfinite().all())), None)
    if broken is not None:
        raise NonFiniteError(
            f"What the channels of '{broken}' add to the loss is NaN or infinite for some of them, so they cannot be "
            "weighed. Look for NaN in the data or the teacher."
        )
    return means
