"""Residual blocks that give the mean of their shortcut and their residual, written as weights of the plain network.

What a mixed block gives is half of what the plain one does: h' = (s + r) / 2. With H = 2^n h behind the n-th of them
the plain sum stands again, H' = s(H) + 2^n r(H / 2^n), so it is enough to scale what reads the stream, what writes to
it, and the reader behind the last block. Powers of two lose nothing, and the network needs no new operation.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remos_hf.activations import alter, evaluating, watch
from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.operator_norm import CONVOLUTIONS, NORMED, Times, computed

_SHORTCUTS = ("shortcut", "downsample", "convShortcut")
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Mix:
    """What is scaled, by dotted name.

    Attributes:
        blocks: The blocks that mix, with what writes to the sum: the last layer of the residual and, where it is no
            identity, of the shortcut.
        weights: Factors of layers' and norms' weights.
        biases: Factors of their biases.
        norms: Factors of what batch norms read from the stream.
    """

    blocks: dict[str, list[str]]
    weights: dict[str, float]
    biases: dict[str, float]
    norms: dict[str, float]


def mix_of(model: nn.Module, blocks: Sequence[str], behind: Sequence[str]) -> Mix:
    """Say what is scaled where these blocks mix.

    Args:
        model: The model.
        blocks: Names of residual blocks that follow one another.
        behind: Names of the modules behind the last of them, in order.

    Raises:
        UnsupportedModelError: A block is of no known form; names it.
    """
    mix = Mix({}, {}, {}, {})
    for number, name in enumerate(blocks):
        block, stream = model.get_submodule(name), 0.5**number
        known = _weighted(block, name)
        others = {f"{name}.{one.rpartition('.')[0]}".rstrip(".") for one, _ in block.named_parameters()} - set(known)
        beside = [child for child, _ in block.named_children() if child in _SHORTCUTS]
        shortcut = [one for one in known if any(f"{one}.".startswith(f"{name}.{child}.") for child in beside)]
        main = [one for one in known if one not in shortcut]
        if others or not main:
            raise _unknown(model, name, f"'{min(others)}' is neither" if others else "it has none")
        _read(mix, model, main[0], stream)
        # Where a norm comes first, what stands in for the shortcut reads behind it.
        if shortcut and main[0] not in mix.norms:
            _read(mix, model, shortcut[0], stream)
        mix.blocks[name] = [path[-1] for path in (main, shortcut) if path]
        for writer in mix.blocks[name]:
            if model.get_submodule(writer).weight is None:
                raise _unknown(model, name, f"'{writer}' has no weight")
            _written(mix, model, writer, 1 / stream)
    readers = [one for name in behind for one in _weighted(model.get_submodule(name), name, (*NORMED, _BatchNorm))]
    _read(mix, model, readers[0], 0.5 ** len(blocks))
    return mix


def _weighted(module: nn.Module, name: str, kinds: tuple[type, ...] = (*CONVOLUTIONS, _BatchNorm)) -> list[str]:
    """Name the layers and batch norms of a module in the order in which they were made."""
    return [f"{name}.{one}".rstrip(".") for one, inner in module.named_modules() if isinstance(inner, kinds)]


def _read(mix: Mix, model: nn.Module, name: str, factor: float) -> None:
    if isinstance(model.get_submodule(name), _BatchNorm):
        mix.norms[name] = factor
    else:
        mix.weights[name] = mix.weights.get(name, 1.0) * factor


def _written(mix: Mix, model: nn.Module, name: str, factor: float) -> None:
    mix.weights[name] = mix.weights.get(name, 1.0) * factor
    if model.get_submodule(name).bias is not None:
        mix.biases[name] = factor


def proven(adapter: Adapter, mix: Mix, batch: object) -> None:
    """Try, on a batch, that the blocks are sums of the known form, and that the model so scaled is the mixed one.

    Raises:
        UnsupportedModelError: It is not; names the block, or the first of them.
    """
    model, scaled = adapter.model, copy.deepcopy(adapter.model)
    read_through_norms(scaled, mix)
    apply_mix(scaled, mix)
    blocks = {name: model.get_submodule(name) for name in mix.blocks}
    given: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(model), evaluating(scaled):
        with watch(blocks, lambda name, read, _: given.__setitem__(name, read.clone())):
            adapter.forward(batch)
        for name in mix.blocks:
            _check_sum(model, name, mix.blocks[name], given[name])
        with alter(blocks, lambda _, made: made / 2):
            wanted = _logits(adapter.forward(batch))
        found = _logits(type(adapter)(scaled, adapter.head).forward(batch))
    apart = float((wanted - found).abs().max())
    if not apart <= _ROUNDING * max(1.0, float(wanted.abs().max())):
        raise _unknown(model, next(iter(mix.blocks)), f"written as weights, the mix is {apart:.2g} off")


def _check_sum(model: nn.Module, name: str, writers: list[str], given: Tensor) -> None:
    """Refuse a block that is not shortcut + residual, with a ReLU behind it or nothing."""
    block = copy.deepcopy(model.get_submodule(name))
    plain = block(given.clone())
    # Without its residual, a block with an identity beside it gives what it reads; one that sums what two layers
    # write gives twice as much if both write twice as much.
    factor = 0.0 if len(writers) == 1 else 2.0
    for writer in writers:
        for parameter in block.get_submodule(writer.removeprefix(f"{name}.")).parameters(recurse=False):
            parameter.mul_(factor)
    found = block(given.clone())
    wanted = [given, given.relu()] if factor == 0 else [2 * plain]
    if not any(one.shape == found.shape and torch.allclose(one, found, _ROUNDING, _ROUNDING) for one in wanted):
        raise _unknown(model, name, "it is no such sum")


def _logits(outputs: object) -> Tensor:
    return (outputs if isinstance(outputs, Tensor) else outputs["logits"]).float()


@torch.no_grad()
def read_through_norms(model: nn.Module, mix: Mix) -> None:
    """Bring the statistics of batch norms that read the stream to its scale, in place. Once, before training."""
    for name, factor in mix.norms.items():
        norm = model.get_submodule(name)
        if norm.running_mean is not None:
            norm.running_mean.div_(factor)
            norm.running_var.div_(factor**2)


def apply_mix(model: nn.Module, mix: Mix) -> None:
    """Have the modules compute what is scaled, in place, behind whatever else computes their weights."""
    for parameter, factors in (("weight", mix.weights), ("bias", mix.biases)):
        for name, factor in factors.items():
            if factor != 1:
                computed(model.get_submodule(name), parameter, Times(factor))
    for name, factor in mix.norms.items():
        model.get_submodule(name).eps /= factor**2


@torch.no_grad()
def end_mix(model: nn.Module, mix: Mix) -> None:
    """Give batch norms their own eps back, in place; their running variance takes the difference."""
    for name, factor in mix.norms.items():
        norm = model.get_submodule(name)
        own = norm.eps * factor**2
        if norm.running_var is not None:
            norm.running_var.add_(norm.eps - own)
        norm.eps = own


def _unknown(model: nn.Module, name: str, why: str) -> UnsupportedModelError:
    kind = type(model.get_submodule(name)).__name__
    return UnsupportedModelError(
        f"The mix of shortcut and residual is known for residual blocks of convolutions with batch norms, whose sum is "
        f"followed by a ReLU or by nothing, but '{name}' is a {kind}: {why}. Leave mix=False."
    )
