"""Forget the weights outside a slice, in place, and decide what stands there instead."""

import hashlib
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError, NonFiniteError, UnsupportedModelError
from remos_hf.layers import Layer, rankable_layers
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.slicing.relevant_slice import RelevantSlice

REFILLS = ("zero", "init", "mean", "reconstruct")
# Ridge of "reconstruct", as a share of the mean second moment of a layer's inputs: enough to solve for inputs that
# never vary, too little to be seen where they do.
RIDGE = 1e-4

Refill = Literal["zero", "init", "mean", "reconstruct"]


@torch.no_grad()
def reset_outside(
    model: nn.Module,
    relevant: RelevantSlice,
    *,
    to: Refill = "zero",
    seed: int = 0,
    verify_teacher: bool = True,
    means: Mapping[str, Tensor] | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give up the teacher's value of every weight outside the slice, in place. They train again; nothing is frozen.

    Everything is checked before the first weight is written.

    Args:
        model: The student, as it was started from the teacher, before any wrapping.
        relevant: The slice to keep.
        to: What stands there instead. "zero", the artifact's way. "init": what a layer that was never trained starts
            with. "mean": zero, and the layer's bias takes what the given-up weights contributed on average; where
            there is no bias, and for rows of embeddings, just zero, and a warning says so. "reconstruct": zero, and
            the kept weights move to where the outputs are nearest to the teacher's on the student's data; rows of
            embeddings likewise stay as they are.
        seed: Seed of "init". Each parameter draws by itself, so the order of layers does not matter.
        verify_teacher: Refuse a model whose sliced weights are not the teacher's, bit for bit.
        means: For "mean": the mean of each input neuron by layer name (`Layer.name`). Shape (in,).
        second_moments: For "reconstruct": the mean of x x^T by layer name, x being what a row of the weight is
            multiplied with (of a convolution the unfolded patch). Shape (d, d), or (groups, d, d).

    Returns:
        The model.

    Raises:
        ValueError: `to` is none of the four, or its statistics are missing.
        TypeError: `relevant` is no slice.
        LayerMismatchError: The slice names weights that the model does not have, or statistics are of another shape.
        TeacherMismatchError: The model's weights are not those of the slice's teacher.
        NonFiniteError: The statistics hold NaN or infinity.
        UnsupportedModelError: A weight is on the meta device, quantised or sharded.

    Source:
        ReMoS artifact, nc_weight_rank_pruner.py:155 (zero). The others are ours; "reconstruct" solves the problem of
        Optimal Brain Surgeon for a set of weights of each row.
    """
    if to not in REFILLS:
        raise ValueError(f"to is one of {', '.join(map(repr, REFILLS))}, but got {to!r}.")
    if not isinstance(relevant, RelevantSlice):
        raise TypeError(f"relevant is what choose_slice gives, but got {type(relevant).__name__}.")
    adapter = adapter_for(model, ())
    layers = relevant.check_matches(adapter.layers(embeddings=True), verify_teacher=False)
    if len(rankable_layers(layers)) != len(layers):
        raise UnsupportedModelError("Some of the slice's weights cannot be reset. Load an unquantised model.")
    statistics = {"mean": means, "reconstruct": second_moments}.get(to, {})
    if to in ("mean", "reconstruct"):
        statistics = _checked(to, layers, statistics)
    if verify_teacher:
        relevant.check_matches(adapter.layers(embeddings=True))
    _tell_frozen(model, layers)
    _tell_without(to, layers)
    for key, layer in layers.items():
        weight = layer.weight
        given_up = ~relevant.kept[key].to(weight.device)
        weight.copy_(_refilled(adapter, layer, given_up, to, seed, statistics))
    return model


def _refilled(
    adapter: Adapter, layer: Layer, given_up: Tensor, to: str, seed: int, statistics: Mapping[str, Tensor]
) -> Tensor:
    """Give what a weight becomes, and write what goes into its bias."""
    weight = layer.weight
    if to == "init":
        fresh = adapter.fresh_weight(layer, parameter_generator(seed, layer.key))
        return torch.where(given_up, fresh.to(weight), weight)
    if to == "mean" and _can_be_refilled(to, layer):
        mean = statistics[layer.name].to(weight.device, torch.float64)
        rows = layer.by_output(weight.double() * given_up)
        bias = layer.bias
        bias.copy_((bias.double() + mean_contribution(rows, layer.columns_of(mean))).to(bias))
    elif to == "reconstruct" and _can_be_refilled(to, layer):
        moment = statistics[layer.name].to(weight.device, torch.float64)
        rows, gone = layer.by_output(weight.double()), layer.by_output(given_up)
        moments = moment if moment.dim() == 3 else moment[None]
        made = [reconstructed(*group) for group in zip(rows, gone, moments, strict=True)]
        return layer.from_output(torch.stack(made)).to(weight)
    return weight.masked_fill(given_up, 0)


def mean_contribution(rows: Tensor, columns: Tensor) -> Tensor:
    """Find what weights add to their outputs on average.

    Args:
        rows: Weights, 0 where they are not meant. Shape (groups, outputs of a group, columns).
        columns: Mean of what each column is multiplied with. Shape (groups, columns). At the border of a padded
            convolution the true mean is smaller.

    Returns:
        Shape (groups * outputs of a group,).
    """
    return torch.einsum("goc,gc->go", rows, columns).flatten()


def reconstructed(rows: Tensor, given_up: Tensor, moment: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Move the kept weights of each row to where its output is nearest to what it was, the given-up ones being zero.

    Of row w with kept set K it is the v, zero outside K, that minimises E[(v x - w x)^2] + ridge * m * |v_K - w_K|^2,
    m being the mean of the moment's diagonal. Its normal equations are solved over the kept or over the given-up
    weights of the row, whichever are fewer.

    Args:
        rows: Weights. Float64, shape (outputs, columns).
        given_up: Which are given up. Bool, shape of `rows`.
        moment: E[x x^T]. Float64, shape (columns, columns).
        ridge: How dear it is to move a kept weight, as a share of m.

    Returns:
        New weights. Float64, shape of `rows`.
    """
    floor = ridge * float(moment.diagonal().mean()) or 1.0  # inputs that are always zero: nothing moves
    dear = moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse: Tensor | None = None
    result = rows.masked_fill(given_up, 0)
    for row, gone, new in zip(rows, given_up, result, strict=True):
        kept, out = (~gone).nonzero().flatten(), gone.nonzero().flatten()
        if not len(out) or not len(kept):
            continue
        if len(kept) < len(out):
            new[kept] += torch.linalg.solve(dear[kept][:, kept], moment[kept][:, out] @ row[out])
        else:
            inverse = torch.linalg.inv(dear) if inverse is None else inverse
            new[kept] -= inverse[kept][:, out] @ torch.linalg.solve(inverse[out][:, out], row[out])
    return result


def _checked(to: str, layers: Mapping[str, Layer], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Make sure that there are statistics of every layer that takes them, of its shape and finite."""
    argument = "means" if to == "mean" else "second_moments"
    if given is None:
        raise ValueError(f"to={to!r} needs {argument}= of the student's data in the teacher, but got none.")
    found = {}
    for layer in layers.values():
        if not _can_be_refilled(to, layer):
            continue
        if layer.name not in given:
            raise LayerMismatchError(f"{argument} holds nothing of '{layer.name}'. Take them of this teacher.")
        statistic = found[layer.name] = given[layer.name]
        columns = layer.in_neurons if to == "mean" else layer.by_output(layer.weight).shape[-1]
        fitting = [(columns,)] if to == "mean" else [(columns, columns)] * (layer.groups == 1)
        fitting += [(layer.groups, columns, columns)] if to == "reconstruct" else []
        if tuple(statistic.shape) not in fitting:
            raise LayerMismatchError(
                f"{argument} of '{layer.name}' has the shape {tuple(statistic.shape)}, but its weight needs "
                f"{fitting[0]}. Take them of this teacher."
            )
        if not bool(statistic.isfinite().all()):
            raise NonFiniteError(f"{argument} of '{layer.name}' holds NaN or infinity. Check the data.")
    return found


def _can_be_refilled(to: str, layer: Layer) -> bool:
    return not layer.is_embedding and (to != "mean" or layer.bias is not None)


def _tell_without(to: str, layers: Mapping[str, Layer]) -> None:
    left = [key for key, layer in layers.items() if not _can_be_refilled(to, layer)]
    if to in ("mean", "reconstruct") and left:
        why = "have no bias, or are rows of embeddings" if to == "mean" else "are rows of embeddings"
        warnings.warn(
            f"{len(left)} of {len(layers)} weights {why}, so what is given up of them becomes zero and nothing makes "
            f"up for it: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}.",
            stacklevel=3,
        )


def _tell_frozen(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    frozen = [key for key, layer in layers.items() if not layer.parameter.requires_grad]
    if frozen and any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            f"{len(frozen)} of {len(layers)} weights of the slice are frozen, so what is given up of them never trains "
            f"again: {', '.join(frozen[:5])}{' ...' if len(frozen) > 5 else ''}. Choose the slice of the frozen model, "
            "or unfreeze them.",
            stacklevel=3,
        )


def check_rows_are_free(model: nn.Module) -> nn.Embedding:
    """Give the input embeddings, if their rows can be reset without changing anything else.

    Raises:
        TypeError: The model has no input embeddings.
        UnsupportedModelError: Another module that is no embedding holds the same weight, as a language model's head
            does: every token that gets another row would also get another logit.
    """
    embeddings = input_embeddings(model)
    for name, module in model.named_modules():
        owned = any(parameter is embeddings.weight for parameter in module.parameters(recurse=False))
        if owned and not isinstance(module, nn.Embedding):
            raise UnsupportedModelError(
                f"'{name}' is tied to the input embeddings, so rows that are reset would change its outputs for these "
                "tokens. Use embedding_rows='keep', or untie it: load the teacher with tie_word_embeddings=False."
            )
    return embeddings


@torch.no_grad()
def reset_unseen_rows(model: nn.Module, seen: Tensor) -> int:
    """Give the embedding rows of tokens that the student's data never shows the mean of the seen rows, in place.

    Fine-tuning never reaches these rows, and no slice of the body touches them: an attack on the embedding of a rare
    word passes both. The padding row stays.

    Args:
        model: The student, before any wrapping.
        seen: Bool tensor, shape (rows,), True for the tokens of the student's data.

    Returns:
        Number of rows that were reset.

    Raises:
        LayerMismatchError: The model has another number of rows.
        UnsupportedModelError: The head is tied to the rows.
        ValueError: No row is seen.
    """
    embeddings = check_rows_are_free(model)
    rows = embeddings.weight
    if seen.shape != rows.shape[:1]:
        raise LayerMismatchError(
            f"The model has {len(rows)} embedding rows, but {tuple(seen.shape)} tokens were counted."
        )
    if not seen.any():
        raise ValueError("No token was seen, so there is no mean to reset the other rows to.")
    seen = seen.to(rows.device)
    unseen = ~seen
    if embeddings.padding_idx is not None:
        unseen[embeddings.padding_idx] = False
    rows[unseen] = rows[seen].float().mean(0).to(rows)
    return int(unseen.sum())


@torch.no_grad()
def squares_outside(model: nn.Module, relevant: RelevantSlice) -> float:
    """Measure the share of the sum of squared weights that a reset outside the slice gives up, in [0, 1].

    Rules that keep the same number of weights do not give up equally much: this is what makes them comparable.

    Args:
        model: The teacher, or the student before the reset.
        relevant: The slice.
    """
    layers = relevant.check_matches(adapter_for(model, ()).layers(embeddings=True), verify_teacher=False)
    lost = total = 0.0
    for key, layer in layers.items():
        squares = layer.weight.float().square()
        lost += float(squares.masked_fill(relevant.kept[key].to(squares.device), 0).sum(dtype=torch.float64))
        total += float(squares.sum(dtype=torch.float64))
    return lost / total if total else 0.0


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Give a parameter the generator of its own that fresh values are drawn with, whatever the order of parameters."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
