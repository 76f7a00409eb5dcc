"""How much each channel of a layer matters to a task: what its loss gains when the channel is silent."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from remos_hf.activations import alter, capture, evaluating
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
        modules: The layers, by name.
        samples: Labelled data.
        size: About how many samples, over all processes.

    Returns:
        By layer, (channels,), on the CPU; the same on all processes.

    Source:
        DELTA, channel_eval.py, which runs the whole net once for every filter and batch. A loss less that of the whole
        net is the increase; z-scores of both are the same.
    """

    def sums() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"rows": torch.tensor(0.0, dtype=torch.float64)}
        for batch in samples.some(size):
            rows = count_samples(batch)
            found["rows"] += rows
            for name, losses in _silenced(model, modules, batch).items():
                found[name] = found.get(name, 0) + rows * losses.double().cpu()
        return found

    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return _means(together(sums, samples.device))


def _silenced(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    with capture(modules) as made:
        labelled_loss(model, batch)
    found = {}
    for name, module in modules.items():
        shape, count = _channel_shape(made[name])
        numbers = torch.arange(count, device=made[name].device)

        def loss(
            silent: Tensor, name: str = name, module: nn.Module = module, shape: tuple = shape, all_: Tensor = numbers
        ) -> Tensor:
            heard = (all_ != silent).view(shape)
            with alter({name: module}, lambda _, output: output * heard.to(output.dtype)):
                return labelled_loss(model, batch)

        found[name] = _at_once(loss, numbers, max(1, _VALUES_AT_ONCE // made[name].numel()), name)
    return found


def _at_once(loss: Callable[[Tensor], Tensor], numbers: Tensor, chunk: int, name: str) -> Tensor:
    try:
        return vmap(loss, chunk_size=chunk)(numbers)
    except RuntimeError as error:  # what is computed in place, or looks at values, does not run in copies
        logger.warning("The channels of '%s' are silenced one by one, which is slow: %s", name, error)
        return torch.stack([loss(one) for one in numbers])


def loss_by_gradient(
    model: nn.Module, modules: Mapping[str, nn.Module], samples: Samples, size: int
) -> dict[str, Tensor]:
    """Estimate what each channel's silence adds to the mean loss by its activation times the loss's gradient there.

    The first order of `loss_when_silenced`, at the price of one backward pass a batch.

    Args:
        model: As in `loss_when_silenced`.
        modules: As in `loss_when_silenced`.
        samples: As in `loss_when_silenced`.
        size: As in `loss_when_silenced`.

    Source:
        Molchanov et al. 2017 (the Taylor criterion of channels), with its sign.
    """

    def sums() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"rows": torch.tensor(0.0, dtype=torch.float64)}
        for batch in samples.some(size):
            rows = count_samples(batch)
            found["rows"] += rows
            free: dict[str, Tensor] = {}

            def leaf(name: str, output: Tensor, free: dict[str, Tensor] = free) -> Tensor:
                free[name] = torch.zeros_like(output, requires_grad=True)
                return output + free[name]

            with alter(modules, leaf), capture(modules) as made:
                loss = labelled_loss(model, batch)
            gradients = torch.autograd.grad(loss * rows, [free[name] for name in modules])
            for name, gradient in zip(modules, gradients, strict=True):
                product = (gradient.float() * made[name].detach().float()).double()
                axes = [axis for axis, size in enumerate(_channel_shape(product)[0]) if size == 1]
                found[name] = found.get(name, 0) - product.sum(axes).cpu()
        return found

    with evaluating(model), torch.enable_grad():
        return _means(together(sums, samples.device))


def _means(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = float(sums.pop("rows"))
    if not rows:
        raise ValueError("There is no sample to weigh channels by. Pass the student's training data, with labels.")
    return {name: (one / rows).float() for name, one in sums.items()}


def _channel_shape(feature: Tensor) -> tuple[tuple[int, ...], int]:
    """Give the shape in which one number a channel is laid on a feature, and how many there are."""
    axis = 1 if feature.dim() == 4 else feature.dim() - 1
    return tuple(feature.shape[axis] if one == axis else 1 for one in range(feature.dim())), feature.shape[axis]
