"""What can be sliced, and where its neurons lie. The only file that knows weight axes.

A layer is a view of a parameter: all of it, or one expert of a stack. A weight is seen as a matrix of rows and columns
whatever it belongs to: `as_matrix` gives the view and `axis_counts` gives the coverage counts that go with its rows and
its columns, so that the coverage of a weight is a sum of two numbers.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError

RANKABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Last name component of Linear and Conv1D layers that stack equal query, key and value rows.
_STACKED_QKV = frozenset({"c_attn", "qkv", "Wqkv", "in_proj_qkv", "query_key_value"})
# The one of them that stacks them head by head (BLOOM, GPT-NeoX): rows are (head, part, head_dim).
_INTERLEAVED_QKV = "query_key_value"
# What PEFT's layers call the part of the teacher that they are put around; all else in them is the adapter's.
_UNDER_ADAPTER = ("base_layer", "original_module")


@dataclass(frozen=True)
class Layer:
    """One weight that can be sliced: a view of a parameter.

    Attributes:
        name: The key of a profile's counts: the dotted module name of a Linear, convolution or embedding, `key` of
            weights that have no module of their own. Of tied modules, the first in registration order.
        module: The module that owns the parameter.
        aliases: Other modules (dotted names) that hold the very same weight.
        part_sizes: Output neurons of each tensor that a fused layer stacks, e.g. (768, 768, 768); () if not fused.
        part_heads: Heads whose rows interleave the parts, or 0 when the parts follow one another.
        attribute: What the module calls the parameter.
        index: Which expert of a stack (experts, ., .) this is; None if the layer is the whole parameter.
        inputs_first: Whether the weight's first axis is the input: GPT-2's Conv1D (in, out), embeddings (tokens, dim),
            the experts of GPT-OSS.
    """

    name: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    part_sizes: tuple[int, ...] = ()
    part_heads: int = 0
    attribute: str = "weight"
    index: int | None = None
    inputs_first: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, maybe beside other experts'."""
        return getattr(self.module, self.attribute)

    @property
    def parameter_name(self) -> str:
        """Dotted name of `parameter`."""
        if self.index is not None:
            return self.name.removesuffix(f"[{self.index}]")
        return self.name if self.attribute != "weight" else f"{self.name}.weight" if self.name else "weight"

    @property
    def key(self) -> str:
        """The key of a slice's bits: the parameter's name, of an expert with its number in brackets behind it."""
        return self.parameter_name if self.index is None else self.name

    @property
    def weight(self) -> Tensor:
        """The weight itself, detached. Shape: as the module holds it. A subclass may read it from a file each time."""
        return self._one(self.parameter.detach())

    @property
    def bias(self) -> Tensor | None:
        """What the module adds to the layer's outputs, detached. Shape (out,); None if it adds nothing."""
        if isinstance(self.module, nn.MultiheadAttention):
            packed = self.module.in_proj_bias
            place = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight").index(self.attribute)
            return None if packed is None else packed.detach() if place == 3 else packed.detach().chunk(3)[place]
        bias = getattr(self.module, "bias" if self.attribute == "weight" else f"{self.attribute}_bias", None)
        return self._one(bias.detach()) if isinstance(bias, Tensor) else None

    def _one(self, stacked: Tensor) -> Tensor:
        return stacked if self.index is None else stacked[self.index]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, without reading it."""
        return self.parameter.shape if self.index is None else self.parameter.shape[1:]

    @property
    def numel(self) -> int:
        """Number of weights, without reading them."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type that `weight` has, without reading it."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where `weight` lies, without reading it."""
        return self.parameter.device

    @property
    def is_embedding(self) -> bool:
        """Whether input neurons are token ids."""
        return isinstance(self.module, nn.Embedding)

    @property
    def groups(self) -> int:
        """Convolution groups; 1 for everything else."""
        return self.module.groups if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) else 1

    @property
    def neuron_axis(self) -> int:
        """Axis of an activation on which its neurons lie: 1 for convolutions, the last one otherwise."""
        return 1 if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) else -1

    @property
    def in_neurons(self) -> int:
        """Number of input neurons."""
        return self.shape[0] if self.inputs_first else self.shape[1] * self.groups

    @property
    def out_neurons(self) -> int:
        """Number of output neurons."""
        return self.shape[1] if self.inputs_first else self.shape[0]

    def as_matrix(self, weight: Tensor) -> Tensor:
        """View a weight-shaped tensor as (rows, columns); kernel positions are columns. Shape: (first axis, rest)."""
        return weight.reshape(weight.shape[0], -1)

    def axis_counts(self, input_counts: Tensor, output_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Lay coverage counts along the rows and the columns of `as_matrix`.

        Args:
            input_counts: Samples that cover each input neuron. Shape (in,).
            output_counts: Samples that cover each output neuron. Shape (out,).

        Returns:
            Row counts (rows,) and column counts (groups, columns). The weight coverage of entry (r, c) is
            rows[r] + columns[r // (rows / groups), c]. Source: ReMoS artifact, nc_weight_rank_pruner.py:79-84.
        """
        if self.inputs_first:
            return input_counts, output_counts[None]
        return output_counts, self.columns_of(input_counts)

    def columns_of(self, inputs: Tensor) -> Tensor:
        """Lay a value of each input neuron along the columns of `by_output`. Shape (in,) to (groups, columns)."""
        kernel = 1 if self.inputs_first else self.shape[2:].numel()
        return inputs.view(self.groups, -1).repeat_interleave(kernel, dim=1)

    def by_output(self, weight: Tensor) -> Tensor:
        """View a weight-shaped tensor as (groups, outputs of a group, columns): each row makes one output neuron."""
        matrix = self.as_matrix(weight)
        return matrix.T[None] if self.inputs_first else matrix.unflatten(0, (self.groups, -1))

    def from_output(self, rows: Tensor) -> Tensor:
        """Undo `by_output`. Shape (groups, outputs of a group, columns) to the weight's."""
        return (rows[0].T if self.inputs_first else rows).reshape(self.shape)

    def split_parts(self, output: Tensor) -> tuple[Tensor, ...]:
        """Cut a fused output into the tensors it stacks. Shape (..., out) to parts of shape (..., out / parts)."""
        if not self.part_sizes:
            return (output,)
        if not self.part_heads:
            return output.split(self.part_sizes, dim=-1)
        by_head = output.unflatten(-1, (self.part_heads, len(self.part_sizes), -1))
        return tuple(by_head[..., part, :].flatten(-2) for part in range(len(self.part_sizes)))

    def join_parts(self, parts: Iterable[Tensor]) -> Tensor:
        """Put per-neuron results of `split_parts` back in the order of the output neurons. Shape (samples, out)."""
        parts = tuple(parts)
        if not self.part_heads:
            return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        by_head = [part.unflatten(-1, (self.part_heads, 1, -1)) for part in parts]
        return torch.cat(by_head, dim=-2).flatten(-3)


def sliceable_layers(
    model: nn.Module,
    *,
    exclude: Iterable[str] = (),
    embeddings: Iterable[str] = (),
    num_heads: int = 0,
    qkv_sizes: tuple[int, ...] = (),
) -> dict[str, Layer]:
    """Find every weight of a model that has neurons at both ends, tied ones once.

    Left out are weights that a parametrization computes, the own weights of adapters (LoRA and its like), and weights
    that are tied to one in `exclude`.

    Args:
        model: Any module.
        exclude: Dotted names of modules that are left alone with everything below them (the head).
        embeddings: Dotted names of embeddings whose rows may be given up too.
        num_heads: Attention heads, for fused layers that interleave query, key and value by head; 0 if there are none.
        qkv_sizes: Output neurons of query, key and value in a fused `qkv_proj` whose parts differ in size.

    Returns:
        Layers by `Layer.name`, in registration order.
    """
    hidden, embeddings = (*exclude, *adapter_parts(model)), frozenset(embeddings)
    spared = parameters_below(model, exclude)
    layers: dict[str, Layer] = {}
    first_name: dict[tuple[int, int | None], str] = {}  # by id of a parameter that the model keeps alive
    for name, module in model.named_modules():
        if is_below(name, hidden):
            continue
        for layer in _layers_of(name, module, embeddings):
            if id(layer.parameter) in spared:
                continue
            tied_to = first_name.setdefault((id(layer.parameter), layer.index), layer.name)
            if tied_to == layer.name:
                sizes, heads = _fused_qkv(layer, num_heads, qkv_sizes)
                layers[layer.name] = replace(layer, part_sizes=sizes, part_heads=heads) if sizes else layer
            else:
                layers[tied_to] = replace(layers[tied_to], aliases=(*layers[tied_to].aliases, name))
    return layers


def _layers_of(name: str, module: nn.Module, embeddings: frozenset[str]) -> Iterator[Layer]:
    if isinstance(module, nn.Embedding):
        known = name in embeddings
    else:
        known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D))
    if known and module._parameters.get("weight") is not None:
        yield Layer(name, module, inputs_first=isinstance(module, (Conv1D, nn.Embedding)))
    elif isinstance(module, nn.MultiheadAttention):
        yield from _packed_attention(name, module)
    elif not known:
        yield from _experts(name, module)


def _packed_attention(name: str, module: nn.MultiheadAttention) -> Iterator[Layer]:
    """Give what MultiheadAttention holds itself; its out_proj is a Linear of its own, though one that is not called."""
    for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if module._parameters.get(attribute) is not None:
            parts = (module.embed_dim,) * 3 if attribute == "in_proj_weight" else ()
            yield Layer(_dotted(name, attribute), module, (), parts, attribute=attribute)


def _experts(name: str, module: nn.Module) -> Iterator[Layer]:
    """Give the experts whose weights a module stacks, each for itself."""
    stacks = {key: one for key, one in module._parameters.items() if one is not None and one.dim() == 3}
    inputs_first = _stacked_inputs_first(module, stacks) if stacks else None
    if inputs_first is None:
        return
    for attribute, stack in stacks.items():
        sizes, heads = (), 0
        outputs = stack.shape[2 if inputs_first else 1]
        if attribute == "gate_up_proj":
            sizes = (outputs // 2,) * 2
            # transformers 4 does not say it; there GPT-OSS is the only one with a bias, and interleaves.
            concatenated = getattr(module, "is_concatenated", not hasattr(module, "gate_up_proj_bias"))
            heads = 0 if concatenated else outputs // 2
        for index in range(len(stack)):
            yield Layer(
                f"{_dotted(name, attribute)}[{index}]", module, (), sizes, heads, attribute, index, inputs_first
            )


def _stacked_inputs_first(module: nn.Module, stacks: Mapping[str, nn.Parameter]) -> bool | None:
    """Tell whether a module's stacks are (experts, in, out) or (experts, out, in); None if they are no known experts.

    transformers 5 says it. Elsewhere the shapes do: what a first matrix makes, a second one reads, after a gate has
    halved it.
    """
    if list(stacks) == ["weight"] and hasattr(module, "output_size"):  # ParallelExperts of JetMoe and GraniteMoe
        return False if stacks["weight"].shape[1:] == (module.output_size, module.input_size) else None
    first = next((stacks[key] for key in ("gate_up_proj", "up_proj") if key in stacks), None)
    second = stacks.get("down_proj")
    if first is None or second is None or len(first) != len(second):
        return None
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    gates = 2 if "gate_up_proj" in stacks else 1
    (_, a, b), (_, c, d) = first.shape, second.shape
    fits = {False: (a, b) == (gates * d, c), True: (a, b) == (d, gates * c)}
    if all(fits.values()):  # no gate stacked: the width of the model decides
        width = getattr(module, "hidden_dim", getattr(module, "hidden_size", None))
        fits = {False: b == width != a, True: a == width != b}
    return next((turned for turned, fit in fits.items() if fit), None)


def _dotted(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def is_below(name: str, roots: Iterable[str]) -> bool:
    """Whether a dotted name is one of the roots or lies below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def parameters_below(model: nn.Module, roots: Iterable[str]) -> frozenset[int]:
    """Ids of the parameters of some modules and of everything below them, under whatever other names they stand."""
    roots = tuple(roots)
    return frozenset(id(one) for name, one in model.named_parameters(remove_duplicate=False) if is_below(name, roots))


def adapter_parts(model: nn.Module) -> tuple[str, ...]:
    """Find what PEFT has put inside a model: dotted names of the modules that hold an adapter's own weights."""
    return tuple(
        _dotted(name, child)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "adapter_layer_names", None), (tuple, list))
        for child, _ in module.named_children()
        if child not in _UNDER_ADAPTER
    )


def _fused_qkv(layer: Layer, num_heads: int, qkv_sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    last = layer.name.rpartition(".")[2]
    if not isinstance(layer.module, (nn.Linear, Conv1D)):
        return (), 0
    inputs, outputs = layer.in_neurons, layer.out_neurons
    if last == "qkv_proj" and qkv_sizes and sum(qkv_sizes) == outputs:
        return qkv_sizes, 0
    if last not in _STACKED_QKV or outputs != 3 * inputs:
        return (), 0
    return (inputs,) * 3, num_heads if last == _INTERLEAVED_QKV else 0


def rankable_layers(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Leave out weights that have no magnitude to rank, before any of them is read, with a warning.

    Raises:
        UnsupportedModelError: A weight is not here (on the meta device, sharded), or no layer can be ranked.
        LayerMismatchError: There is no layer at all.
    """
    if not layers:
        raise LayerMismatchError(
            "The model holds no weight that can be sliced (Linear, Conv1d, Conv2d, GPT-2 Conv1D, experts, packed "
            "attention) outside its head. Pass the model itself, or name a smaller head."
        )
    reasons = {}
    for name, layer in layers.items():
        reason = _why_not_here(layer) or why_not_rankable(layer)
        if reason and _why_not_here(layer):
            raise UnsupportedModelError(f"'{layer.parameter_name}' cannot be ranked: {reason}")
        if reason:
            reasons[name] = f"'{layer.parameter_name}' cannot be ranked: {reason}"
    if len(reasons) == len(layers):
        raise UnsupportedModelError(next(iter(reasons.values())))
    if reasons:
        warnings.warn(
            f"{len(reasons)} of {len(layers)} layers cannot be ranked and are left out; {next(iter(reasons.values()))}",
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if name not in reasons}


def _why_not_here(layer: Layer) -> str:
    weight = layer.parameter
    if layer.device.type == "meta":
        return "it is on the meta device and has no values. Load the teacher's weights first."
    if hasattr(weight, "ds_id") or hasattr(weight, "_is_flat_param") or type(weight.data).__name__ == "DTensor":
        return "it is sharded by ZeRO-3 or FSDP. Slice before the model is wrapped."
    if weight.numel() == 0:
        return "it is empty here, as ZeRO-3 and FSDP leave it. Slice before the model is wrapped."
    return ""


def why_not_rankable(layer: Layer) -> str:
    """Say why a weight has no magnitude to rank; "" if it has."""
    kind = type(layer.parameter.data)
    if kind is not Tensor:
        return f"it is a {kind.__name__}, quantised or wrapped. Slice a plain fp32, bf16 or fp16 copy before."
    if layer.dtype not in RANKABLE_DTYPES:
        return f"its dtype is {layer.dtype}, and ranks need float32, bfloat16 or float16. Load it unquantised."
    return ""


def largest_magnitude(layers: Mapping[str, Layer]) -> float:
    """Find the largest absolute weight, and refuse NaN and infinity on the way.

    Raises:
        NonFiniteError: Names the parameter that holds NaN or infinity.
    """
    largest = 0.0
    for layer in layers.values():
        low, high = (float(end) for end in torch.aminmax(layer.weight))
        magnitude = max(-low, high)
        if not magnitude < float("inf"):
            raise NonFiniteError(
                f"'{layer.key}' holds NaN or infinity, so its weights have no rank. "
                "The teacher's checkpoint is broken or overflowed in its dtype; load a sound one."
            )
        largest = max(largest, magnitude)
    return largest


def weights_hash(layers: Mapping[str, Layer]) -> str:
    """Fingerprint the sliceable weights: names, dtypes, shapes and bytes. SHA-256 in hex, the same on every device.

    Heads are not sliceable, so a teacher and the student that was just started from it have the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        layer = layers[name]
        weight = layer.weight
        digest.update(f"{layer.key}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        digest.update(memoryview(weight.contiguous().cpu().view(torch.uint8).flatten().numpy()))
        del weight  # of weights read from a file, one at a time is held
    return digest.hexdigest()
