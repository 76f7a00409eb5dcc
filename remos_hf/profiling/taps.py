"""Where activations are read: at modules, at the weights that no module of their own multiplies, between blocks."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remos_hf.activations import watch, watch_calls, watch_products, without_fast_path
from remos_hf.adapters.base import Adapter
from remos_hf.layers import Layer


class Read(NamedTuple):
    """One activation that a layer reads or makes.

    Attributes:
        layer: The layer.
        end: "input" or "output".
        part: Of a fused layer whose parts are made one by one, which part; None for all of them at once.
        call: Name the layer was called by, its end, and which of its calls in this forward pass.
        values: The activation. Token ids of an embedding have an axis of one added.
        neurons: Axis of the neurons.
    """

    layer: Layer
    end: str
    part: int | None
    call: tuple[str, str, int]
    values: Tensor
    neurons: int


SeeRead = Callable[[Read], None]


class Taps:
    """Runs a model on a batch and shows what each layer reads and makes.

    Args:
        adapter: The model's adapter.
        layers: The layers to look at.
        source: "hooks", or "hidden_states" for the states between the model's blocks.
    """

    def __init__(self, adapter: Adapter, layers: Mapping[str, Layer], source: str) -> None:
        self.adapter, self.source, self.layers = adapter, source, dict(layers)
        attentions = {
            name: module for name, module in adapter.model.named_modules() if isinstance(module, nn.MultiheadAttention)
        }
        self._attentions = {
            name: [layer for layer in layers.values() if layer.name.rpartition(".")[0] == name] for name in attentions
        }
        packed = {id(layer) for some in self._attentions.values() for layer in some}
        self._products = {name: layer for name, layer in layers.items() if layer.index is not None}
        self._owners = {
            alias: layer
            for layer in layers.values()
            if id(layer) not in packed and layer.index is None
            for alias in (layer.name, *layer.aliases)
        }

    def run(self, batch: Any, see: SeeRead) -> None:  # noqa: ANN401 - any batch
        """Run the model on a batch and show every activation, in the order they are made."""
        if self.source == "hidden_states":
            self._read_hidden_states(batch, see)
            return
        calls: Counter[tuple[str, str]] = Counter()

        def read(layer: Layer, name: str, end: str, values: Tensor, part: int | None = None) -> None:
            which = end if part is None else f"{end} {part}"
            place = (name, which, calls[name, which])
            calls[name, which] += 1
            tokens = layer.is_embedding and end == "input"
            see(Read(layer, end, part, place, values[..., None] if tokens else values, layer.neuron_axis))

        def module_ran(name: str, given: Tensor, made: Tensor) -> None:
            read(self._owners[name], name, "input", given)
            read(self._owners[name], name, "output", made)

        def product_made(name: str, given: Tensor, made: Tensor, with_bias: bool) -> None:
            layer = self._products[name]
            read(layer, name, "input", given)
            read(layer, name, "output", made if with_bias or layer.bias is None else made + layer.bias)

        def attention_ran(name: str, args: tuple, kwargs: dict, output: Any) -> None:  # noqa: ANN401 - a tuple
            _read_attention(self._attentions[name], self.adapter.model.get_submodule(name), args, kwargs, output, read)

        model = self.adapter.model
        with ExitStack() as stack:
            stack.enter_context(without_fast_path())
            stack.enter_context(self.adapter.plain_experts())
            stack.enter_context(watch({name: model.get_submodule(name) for name in self._owners}, module_ran))
            stack.enter_context(
                watch_calls({name: model.get_submodule(name) for name in self._attentions}, attention_ran)
            )
            if self._products:
                weights = {name: layer.weight for name, layer in self._products.items()}
                stack.enter_context(watch_products(weights, product_made))
            self.adapter.forward(batch)

    def _read_hidden_states(self, batch: Any, see: SeeRead) -> None:  # noqa: ANN401 - any batch
        states = self.adapter.forward(batch, hidden_states=True).hidden_states
        for index, block in enumerate(self.adapter.blocks()):
            for layer in self.layers.values():
                if not layer.name.startswith(f"{block}."):
                    continue
                writes = self.adapter.writes_to_stream(layer)
                state, end = (states[index + 1], "output") if writes else (states[index], "input")
                if state.shape[-1] == (layer.out_neurons if writes else layer.in_neurons):
                    see(Read(layer, end, 0, (layer.name, end, 0), state, -1))


def _read_attention(
    layers: list[Layer], module: nn.MultiheadAttention, args: tuple, kwargs: dict, output: tuple, read: Callable
) -> None:
    """Show what a MultiheadAttention reads and makes: it multiplies packed weights itself and calls no module."""
    given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
    for layer in layers:
        if layer.attribute == "weight":
            read(layer, layer.name, "input", _before_out_proj(module, args, kwargs))
            read(layer, layer.name, "output", output[0])
            continue
        places = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        packed = layer.attribute == "in_proj_weight"
        chosen = given if packed else [given[places.index(layer.attribute)]]
        for tensor in {id(tensor): tensor for tensor in chosen}.values():  # query, key and value may be one
            read(layer, layer.name, "input", tensor)
        if not packed:
            read(layer, layer.name, "output", nn.functional.linear(chosen[0], layer.weight, layer.bias))
            continue
        biases = (None,) * 3 if layer.bias is None else layer.bias.chunk(3)
        for part, (tensor, weight, bias) in enumerate(zip(chosen, layer.weight.chunk(3), biases, strict=True)):
            read(layer, layer.name, "output", nn.functional.linear(tensor, weight, bias), part)


def _before_out_proj(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> Tensor:
    """Attend once more with a projection that changes nothing, which shows what the real one was given."""
    twin = copy.copy(module)
    weight = module.out_proj.weight
    unchanged = nn.Linear(*weight.shape, bias=False, device="meta")  # draws no random number
    unchanged.weight = nn.Parameter(torch.eye(len(weight), device=weight.device, dtype=weight.dtype))
    twin._modules = {**module._modules, "out_proj": unchanged}
    return twin.forward(*args, **kwargs)[0]
