"""What removed weights did on average, and where that goes: the layer's bias, or the norm that follows it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from remos_hf.activations import watch
from remos_hf.adapters.flow import Flow, Operation
from remos_hf.adapters.flow_layouts import factors_of
from remos_hf.adapters.flow_recording import flow_of, on_device_of
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.layers import Layer
from remos_hf.profiling.batches import unpacked
from remos_hf.slicing.contribution_rules import patches_of
from remos_hf.slicing.refill import mean_contribution

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeanInputs:
    """What the weights of every layer are multiplied with on average.

    Attributes:
        columns: By parameter name, over samples and real positions, the padding of a convolution included. Float64,
            shape (groups, columns) as `Layer.by_output` lays a weight out.
        norms: Name of the BatchNorm's running mean by name of the parameter whose outputs it alone reads, and which
            reads no other outputs.
        num_samples: Samples that these are means of.
    """

    columns: Mapping[str, Tensor]
    norms: Mapping[str, str]
    num_samples: int


def profile_mean_inputs(model: nn.Module, batches: Iterable) -> MeanInputs:
    """Take the mean of what every weight is multiplied with.

    Args:
        model: The model before anything is removed, in eval mode.
        batches: Samples in batches, as in `profile_coverage`.

    Raises:
        ValueError: There is no sample, or as `flow_of`.
        NonFiniteError: A layer reads NaN or infinity at a real position.
        UnsupportedModelError: Padding or samples cannot be told in what a layer reads; or as `flow_of`.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    norms: dict[str, str] = {}
    num_samples = 0
    for batch in unpacked(batches):
        flow, beside = _flow_and_beside(model, on_device_of(model, batch))
        num_samples += flow.num_samples
        norms.update(_norms_of(flow, model))
        followed = [(one.layer, _column_sums(flow, one, one.layer)) for one in flow.operations if one.layer is not None]
        known = {layer.parameter_name for layer, _ in followed}
        followed += [
            (layer, _row_sums(flow, given, layer)) for layer, given in beside if layer.parameter_name not in known
        ]
        for layer, (total, count) in followed:
            name = layer.parameter_name
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + count
    if not num_samples:
        raise ValueError("There is no sample to take means of. Pass batches of the samples that stay.")
    for name, one in sums.items():
        if not bool(one.isfinite().all()):
            raise NonFiniteError(
                f"What '{name}' reads held NaN or infinity on this data, so it has no mean. Check the data, or run the "
                "model in float32."
            )
    return MeanInputs({name: (one / counts[name]).cpu() for name, one in sums.items()}, norms, num_samples)


def _flow_and_beside(model: nn.Module, batch: Any) -> tuple[Flow, list[tuple[Layer, Tensor]]]:  # noqa: ANN401 - any batch
    """Give the flow of a batch, and what Linear layers read: a flow leaves out those that make attention's pattern."""
    found: list[tuple[Layer, Tensor]] = []
    layers = {
        name: layer
        for name, layer in adapter_for(model, ()).layers().items()
        if layer.neuron_axis == -1 and layer.attribute == "weight" and layer.index is None
    }
    modules = {name: layer.module for name, layer in layers.items()}
    with watch(modules, lambda name, given, _: found.append((layers[name], given.detach().clone()))):
        flow = flow_of(model, batch)
    return flow, found


def _column_sums(flow: Flow, operation: Operation, layer: Layer) -> tuple[Tensor, int]:
    """Add up what the columns of a weight are multiplied with, and count the positions that are added."""
    number = operation.inputs[0]
    given = flow.values[number].detach().float()
    if factors_of(flow.layouts[number])[:1] != [("n", flow.num_samples)]:
        raise UnsupportedModelError(f"'{operation.name}' reads samples that do not lie on the first axis.")
    if layer.neuron_axis == 1:
        mean = patches_of(given.mean(0, keepdim=True), operation, layer).double()
        positions = mean.view(-1, layer.groups, mean.shape[1])
        return positions.sum(0) * flow.num_samples, len(positions) * flow.num_samples
    return _row_sums(flow, given, layer)


def _row_sums(flow: Flow, given: Tensor, layer: Layer) -> tuple[Tensor, int]:
    """Likewise of a Linear layer, at real positions."""
    rows = given.reshape(flow.num_samples, -1, layer.in_neurons).double()
    if flow.real is None or rows.shape[1] == 1:
        return rows.sum((0, 1))[None], rows.shape[:2].numel()
    if rows.shape[:2] != flow.real.shape:
        raise UnsupportedModelError(
            f"'{layer.name}' reads {rows.shape[1]} positions of each sample, and which of them are padding cannot "
            "be told. Give batches without padding."
        )
    return (rows * flow.real[..., None]).sum((0, 1))[None], int(flow.real.sum())


def _norms_of(flow: Flow, model: nn.Module) -> dict[str, str]:
    """Find the BatchNorms that alone read what a layer makes, each time that it runs, and nothing else."""
    buffers = {id(one): name for name, one in model.named_buffers()}
    read: dict[str, list[str | None]] = {}
    uses = [_norm_in(one, buffers) for one in flow.operations]
    for operation in flow.operations:
        if operation.layer is not None:
            readers = [one for one in flow.operations if operation.output in one.inputs]
            norm = _norm_in(readers[0], buffers) if len(readers) == 1 else None
            read.setdefault(operation.layer.parameter_name, []).append(norm)
    return {
        name: norms[0]
        for name, norms in read.items()
        if norms[0] is not None and norms == norms[:1] * uses.count(norms[0])
    }


def _norm_in(operation: Operation, buffers: Mapping[int, str]) -> str | None:
    """Name the running mean of a BatchNorm; None of anything else."""
    return buffers.get(id(operation.argument(1, "running_mean"))) if operation.name == "batch_norm" else None


def give_mean(model: nn.Module, layers: Mapping[str, Layer], removed: Mapping[str, Tensor], means: MeanInputs) -> None:
    """Add to a model, in place, what removed weights contributed on average.

    The mean goes into the layer's bias; of a layer without one, out of the running mean of the BatchNorm that alone
    reads it. Where there is neither nothing makes up for the weights, and a log line says so.

    Args:
        model: The model, on its weights as they were.
        layers: Its layers by parameter name.
        removed: The weights that go, 0 where they stay. By parameter name, shape of the weight.
        means: What they are multiplied with on average.

    Raises:
        LayerMismatchError: The means are of another model.
    """
    if not means.columns.keys() & layers.keys():
        raise LayerMismatchError(f"The means hold nothing of '{next(iter(layers))}', ... Take them of this model.")
    effects = {name: _mean_effect(name, layer, removed[name], means) for name, layer in layers.items()}
    buffers, left = dict(model.named_buffers()), []
    for name, layer in layers.items():
        effect = effects[name]
        if effect is not None and layer.bias is not None:
            layer.bias.copy_((layer.bias.double() + effect).to(layer.bias))
        elif effect is not None and name in means.norms:
            mean = buffers[means.norms[name]]
            mean.copy_((mean.double() - effect).to(mean))
        elif effect is None or bool(effect.any()):
            left.append(name)
    if left:
        logger.warning(
            "%d of %d layers did not run, or have no bias and no BatchNorm behind them, so nothing makes up for what "
            "is removed: %s%s.", len(left), len(layers), ", ".join(left[:5]), " ..." if len(left) > 5 else "",
        )  # fmt: skip


def _mean_effect(name: str, layer: Layer, removed: Tensor, means: MeanInputs) -> Tensor | None:
    """Give what a layer's removed weights contributed on average, (out,); None if nothing is known of it."""
    columns = means.columns.get(name)
    if columns is None:
        return None
    rows = layer.by_output(removed.double())
    if columns.shape != (rows.shape[0], rows.shape[2]):
        raise LayerMismatchError(
            f"The means of '{name}' have the shape {tuple(columns.shape)}, but its weight needs "
            f"{(rows.shape[0], rows.shape[2])}. Take them of this model."
        )
    return mean_contribution(rows, columns.to(rows.device))
