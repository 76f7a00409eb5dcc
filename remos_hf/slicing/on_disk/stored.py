"""Layers whose weights lie in a teacher's files and are read anew each time they are asked for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from remos_hf.adapters.architecture import Placed, first_names
from remos_hf.adapters.teacher_files import StoredTensor
from remos_hf.errors import UnsupportedModelError
from remos_hf.layers import Layer

_COMPARED_BYTES = 2**22
_INSTEAD = "Load the model and use choose_slice and reset_outside instead."


@dataclass(frozen=True, kw_only=True)
class StoredLayer(Layer):
    """A layer whose weight lies in a file and is read anew each time it is asked for.

    Attributes:
        copies: Where it is stored, each time as the tensors whose rows follow one another (an expert's gate and up
            projection, else one tensor); more than once if tied modules were all saved.
        loaded_as: Type that from_pretrained gives it.
    """

    copies: tuple[tuple[StoredTensor, ...], ...] = field(repr=False)
    loaded_as: torch.dtype

    @property
    def weight(self) -> Tensor:
        """Read the weight. Shape: as the module would hold it."""
        pieces = self.copies[0]
        if len(pieces) == 1:
            return pieces[0].read().to(self.loaded_as)
        return torch.cat([piece.read().to(self.loaded_as) for piece in pieces])

    @property
    def dtype(self) -> torch.dtype:
        """Type that `weight` has."""
        return self.loaded_as

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")


def find_stored(model: PreTrainedModel, competing: Mapping[str, Layer], placed: Placed) -> dict[str, StoredLayer]:
    """Find the tensor of each layer in the files.

    Args:
        model: The architecture.
        competing: Its layers that compete.
        placed: Where the stored tensors go.

    Raises:
        UnsupportedModelError: A layer's weight is joined, cut or renamed on the way, or two copies of it differ.
    """
    names, stored = first_names(model), {}
    for name, layer in competing.items():
        place = names[id(layer.parameter)]
        copies = _copies(placed, place, layer.index)
        if not copies:
            seen = next(iter(placed.converted.get(place, placed.unknown)), None)
            raise UnsupportedModelError(
                f"No tensor of the checkpoint becomes '{layer.key}' of {type(model).__name__} as it is: "
                f"transformers {transformers.__version__} joins, cuts or renames it"
                f"{f', as it does with {seen.name!r}' if seen else ''}. {_INSTEAD}"
            )
        if len(copies) > 1:
            _check_equal([pieces[0] for pieces in copies])
        same = {one.name: getattr(layer, one.name) for one in fields(layer)}
        stored[name] = StoredLayer(**same, copies=copies, loaded_as=_loaded_as(model, layer))
    return stored


def _copies(placed: Placed, place: str, index: int | None) -> tuple[tuple[StoredTensor, ...], ...]:
    if index is None:
        return tuple((tensor,) for tensor in placed.tensors.get(place, ()))
    if place in placed.experts:
        return (placed.experts[place][index],)
    return tuple((_expert(tensor, index),) for tensor in placed.tensors.get(place, ()))


def _expert(stack: StoredTensor, index: int) -> StoredTensor:
    """Give the part of a stored stack that is one expert."""
    size = (stack.stop - stack.start) // stack.shape[0]
    start = stack.start + index * size
    return replace(stack, shape=stack.shape[1:], start=start, stop=start + size)


def _check_equal(tensors: Sequence[StoredTensor]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        with first.path.open("rb") as one, other.path.open("rb") as two:
            one.seek(first.start)
            two.seek(other.start)
            left, same = first.stop - first.start, first.dtype == other.dtype
            while same and left:
                size = min(left, _COMPARED_BYTES)
                same, left = one.read(size) == two.read(size), left - size
        if not same:
            raise UnsupportedModelError(
                f"'{first.name}' and '{other.name}' are one weight in the model that config.json describes, but differ "
                f"in the files. {_INSTEAD}"
            )


def _loaded_as(model: PreTrainedModel, layer: Layer) -> torch.dtype:
    """Type that from_pretrained gives a weight: the config's, but for modules that their author keeps in float32."""
    dtype = layer.dtype
    kept_wide: list[str] = []
    if dtype == torch.float16:
        kept_wide += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        kept_wide += model._keep_in_fp32_modules_strict or ()
    patterns = (re.escape(name).replace(r"\*", ".*") for name in kept_wide)
    wide = any(re.search(rf"(^|\.){pattern}(\.|$)", layer.parameter_name) for pattern in patterns)
    return torch.float32 if wide else dtype
