"""What can be sliced, and where its neurons lie. The only file that knows weight axes.

A weight is seen as a matrix of rows and columns whatever its module: `as_matrix` gives the view and `axis_counts` gives
the coverage counts that go with its rows and its columns, so that the coverage of a weight is a sum of two numbers.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError

RANKABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Last name component of Linear and Conv1D layers that stack equal query, key and value rows.
_STACKED_QKV = frozenset({"c_attn", "qkv", "Wqkv", "in_proj_qkv", "query_key_value"})
# The one of them that stacks them head by head (BLOOM, GPT-NeoX): rows are (head, part, head_dim).
_INTERLEAVED_QKV = "query_key_value"


@dataclass(frozen=True)
class Layer:
    """One weight that can be sliced.

    Attributes:
        name: Dotted module name; the key of a profile's counts. Of tied modules, the first in registration order.
        module: The module itself.
        aliases: Other modules (dotted names) that hold the very same weight.
        part_sizes: Output neurons of each tensor that a fused layer stacks, e.g. (768, 768, 768); () if not fused.
        part_heads: Heads whose rows interleave the parts, or 0 when the parts follow one another.
    """

    name: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    part_sizes: tuple[int, ...] = ()
    part_heads: int = 0

    @property
    def parameter_name(self) -> str:
        """Dotted name of the weight; the key of a slice's bits."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def weight(self) -> Tensor:
        """The weight itself, detached. Shape: as the module holds it. A subclass may read it from a file each time."""
        return self.module.weight.detach()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, without reading it."""
        return self.module.weight.shape

    @property
    def numel(self) -> int:
        """Number of weights, without reading them."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type that `weight` has, without reading it."""
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where `weight` lies, without reading it."""
        return self.module.weight.device

    @property
    def is_embedding(self) -> bool:
        """Whether input neurons are token ids."""
        return isinstance(self.module, nn.Embedding)

    @property
    def groups(self) -> int:
        """Convolution groups; 1 for everything else."""
        return getattr(self.module, "groups", 1)

    @property
    def inputs_first(self) -> bool:
        """Whether the weight's first axis is the input: GPT-2's Conv1D (in, out), embeddings (tokens, dim)."""
        return isinstance(self.module, (Conv1D, nn.Embedding))

    @property
    def neuron_axis(self) -> int:
        """Axis of an activation on which its neurons lie: 1 for convolutions, the last one otherwise."""
        return 1 if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) else -1

    @property
    def in_neurons(self) -> int:
        """Number of input neurons."""
        shape = self.module.weight.shape
        return shape[0] if self.inputs_first else shape[1] * self.groups

    @property
    def out_neurons(self) -> int:
        """Number of output neurons."""
        shape = self.module.weight.shape
        return shape[1] if self.inputs_first else shape[0]

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
        kernel = self.module.weight.shape[2:].numel()
        return output_counts, input_counts.view(self.groups, -1).repeat_interleave(kernel, dim=1)

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
    """Find every weight of a model that can be sliced, tied ones once.

    Args:
        model: Any module.
        exclude: Dotted names of modules that are left alone with everything below them (the head).
        embeddings: Dotted names of embeddings whose rows may be given up too.
        num_heads: Attention heads, for fused layers that interleave query, key and value by head; 0 if there are none.
        qkv_sizes: Output neurons of query, key and value in a fused `qkv_proj` whose parts differ in size.

    Returns:
        Layers by module name, in registration order.

    Raises:
        UnsupportedModelError: A weight is computed by a parametrization, so it cannot be reset.
    """
    exclude, embeddings = tuple(exclude), frozenset(embeddings)
    layers: dict[str, Layer] = {}
    first_name: dict[int, str] = {}  # id of a parameter that the model keeps alive
    for name, module in model.named_modules():
        if not _is_sliceable(name, module, embeddings) or _is_below(name, exclude):
            continue
        if "weight" not in module._parameters:
            raise UnsupportedModelError(
                f"The weight of '{name}' is computed from other parameters (a parametrization), so nothing can be "
                "reset in it. Remove the parametrization first, for instance with torch.nn.utils.parametrize."
            )
        tied_to = first_name.setdefault(id(module.weight), name)
        if tied_to == name:
            sizes, heads = _fused_parts(name, module, num_heads, qkv_sizes)
            layers[name] = Layer(name, module, (), sizes, heads)
        else:
            known = layers[tied_to]
            layers[tied_to] = Layer(
                known.name, known.module, (*known.aliases, name), known.part_sizes, known.part_heads
            )
    return layers


def _is_sliceable(name: str, module: nn.Module, embeddings: frozenset[str]) -> bool:
    if isinstance(module, nn.Embedding):
        return name in embeddings
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D))


def _is_below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _fused_parts(name: str, module: nn.Module, num_heads: int, qkv_sizes: tuple[int, ...]) -> tuple[tuple, int]:
    last = name.rpartition(".")[2]
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    elif isinstance(module, nn.Linear):
        outputs, inputs = module.weight.shape
    else:
        return (), 0
    if last == "qkv_proj" and qkv_sizes and sum(qkv_sizes) == outputs:
        return qkv_sizes, 0
    if last not in _STACKED_QKV or outputs != 3 * inputs:
        return (), 0
    return (inputs,) * 3, num_heads if last == _INTERLEAVED_QKV else 0


def check_rankable(layers: Mapping[str, Layer]) -> None:
    """Refuse weights that have no magnitude to rank, before any of them is read.

    Raises:
        UnsupportedModelError: A weight is on the meta device, quantised, sharded, or of another dtype.
        LayerMismatchError: There is no layer at all.
    """
    if not layers:
        raise LayerMismatchError(
            "The model holds no weight that can be sliced (Linear, Conv1d, Conv2d, GPT-2 Conv1D) outside its head. "
            "Pass the model itself, or name a smaller head."
        )
    for layer in layers.values():
        reason = _why_not_rankable(layer)
        if reason:
            raise UnsupportedModelError(f"'{layer.parameter_name}' cannot be ranked: {reason}")


def _why_not_rankable(layer: Layer) -> str:
    weight = layer.module.weight
    if layer.device.type == "meta":
        return "it is on the meta device and has no values. Load the teacher's weights first."
    if hasattr(weight, "ds_id") or hasattr(weight, "_is_flat_param"):
        return "it is sharded by ZeRO-3 or FSDP. Slice before the model is wrapped."
    if type(weight.data) is not Tensor:
        return (
            f"it is a {type(weight.data).__name__}, sharded or quantised. Slice a plain fp32, bf16 or fp16 copy before "
            "the model is wrapped or quantised."
        )
    if layer.dtype not in RANKABLE_DTYPES:
        return f"its dtype is {layer.dtype}, and ranks need float32, bfloat16 or float16. Load it unquantised."
    if weight.numel() == 0:
        return "it is empty here, as ZeRO-3 and FSDP leave it. Slice before the model is wrapped."
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
                f"'{layer.parameter_name}' holds NaN or infinity, so its weights have no rank. "
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
        digest.update(f"{layer.parameter_name}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        digest.update(memoryview(weight.contiguous().cpu().view(torch.uint8).flatten().numpy()))
        del weight  # of weights read from a file, one at a time is held
    return digest.hexdigest()
