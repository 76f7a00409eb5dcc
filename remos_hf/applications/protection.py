"""Hide the weights that matter most of a model that is given away, and ask how dear it is to learn them anew."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import CorruptFileError, LayerMismatchError
from remos_hf.perturbation import unfrozen
from remos_hf.profiling.sidecar_file import file_in, read_tensors, write_tensors
from remos_hf.slicing.ordinal import pack, unpack
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.plain import Finetune
from remos_hf.training.accelerate_loop import Fitted, fit

HIDDEN_FILE = "remos_hidden.safetensors"
_FORMAT = "remos_hf.hidden.v1"


@dataclass(frozen=True)
class HiddenWeights:
    """The weights that were taken out of a model, to be kept apart from it.

    Attributes:
        places: Which weights they are: bool by parameter name, shape of the weight.
        values: What they were, in memory order. By parameter name, shape (hidden weights,).
    """

    places: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    @property
    def share(self) -> float:
        """Share of the weights of these layers that is hidden."""
        return sum(len(one) for one in self.values.values()) / sum(one.numel() for one in self.places.values())

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> nn.Module:
        """Write the hidden weights into a model, in place: whoever has them has the whole model again.

        Raises:
            LayerMismatchError: They are of another model.
        """
        layers = {layer.key: layer for layer in adapter_for(model, ()).layers().values()}
        for name, place in self.places.items():
            if name not in layers or layers[name].shape != place.shape:
                raise LayerMismatchError(
                    f"Weights of '{name}' of shape {tuple(place.shape)} are hidden, but the model has none such."
                )
        for name, place in self.places.items():
            weight = layers[name].weight
            weight[place.to(weight.device)] = self.values[name].to(weight)
        return model

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `remos_hidden.safetensors` into a folder, which is made if need be. Not into that of the model."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {f"places/{name}": pack(one) for name, one in self.places.items()}
        tensors |= {f"values/{name}": one for name, one in self.values.items()}
        shapes = {name: list(one.shape) for name, one in self.places.items()}
        return write_tensors(Path(folder) / HIDDEN_FILE, tensors, _FORMAT, {"shapes": shapes})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "HiddenWeights":
        """Read what `save_pretrained` wrote, from its folder or by its own path.

        Raises:
            CorruptFileError: It is no such file.
        """
        path = file_in(path, HIDDEN_FILE)
        tensors, told = read_tensors(path, _FORMAT, ("shapes",))
        places, values = {}, {}
        for name, shape in _shapes_in(path, told["shapes"]).items():
            bits, value = tensors.pop(f"places/{name}", None), tensors.pop(f"values/{name}", None)
            if bits is None or value is None or bits.dtype != torch.uint8 or bits.shape != (-(-shape.numel() // 8),):
                raise CorruptFileError(f"{path} does not hold the places and values of '{name}'. It is broken.")
            places[name], values[name] = unpack(bits, shape), value
            if value.shape != (int(places[name].sum()),) or not value.is_floating_point():
                raise CorruptFileError(f"{path} holds another number of values of '{name}' than of places.")
        if tensors:
            raise CorruptFileError(f"{path} holds '{next(iter(tensors))}', which belongs to no hidden weights.")
        return cls(places, values)


def _shapes_in(path: Path, told: Any) -> dict[str, torch.Size]:  # noqa: ANN401 - JSON
    fits = isinstance(told, dict) and all(
        isinstance(shape, list)
        and 0 < len(shape) <= 8
        and all(type(size) is int and 0 < size < 2**40 for size in shape)
        for shape in told.values()
    )
    if not fits:
        raise CorruptFileError(f"{path} names no shapes of weights. It is broken.")
    return {name: torch.Size(shape) for name, shape in told.items()}


@torch.no_grad()
def hide_weights(model: nn.Module, hidden: RelevantSlice) -> HiddenWeights:
    """Take weights out of a model, in place; zeros stand where they were.

    Norm statistics and biases stay as the hidden weights made them, and tell of them: that is not hidden here.

    Args:
        model: The model that is given away.
        hidden: Which weights, chosen of this model: `highest_scoring(model, weight_scores(...), share)`.

    Returns:
        What was taken.

    Raises:
        LayerMismatchError: The choice is of another model.
        TeacherMismatchError: The weights are not those that they were chosen of.

    Source:
        NNSlicer, ESEC/FSE 2020, section 5.5.
    """
    layers = hidden.check_matches(adapter_for(model, ()).layers())
    places = {name: hidden.kept[name] for name in layers}
    values = {name: layer.weight[places[name].to(layer.device)].clone().cpu() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight.masked_fill_(places[name].to(layer.device), 0)
    return HiddenWeights(places, values)


def relearn(
    model: nn.Module,
    train_dataset: Dataset,
    *,
    optimizer: Callable[[nn.Module], Optimizer],
    **options: Any,  # noqa: ANN401 - those of fit
) -> Fitted:
    """Attack a model of which weights are hidden: learn them anew, in place, from labelled samples.

    Every parameter trains, wherever it lies: hidden or not, convolutions, shortcuts, norms and head. Those that were
    frozen are frozen again afterwards.

    Args:
        model: What was given away.
        train_dataset: The attacker's budget: labelled samples as `fit` takes them.
        optimizer: Builds the optimizer from the model, likewise.
        **options: Further arguments of `fit`, as epochs, batch_size and seed.

    Raises:
        ValueError: As `fit`.

    Source:
        NNSlicer, ESEC/FSE 2020, section 5.5.
        Differs: its code trains parameters with "conv" in their name alone though others are hidden too, and takes the
        log-softmax of a softmax.
    """
    with unfrozen(model):
        return fit(model, train_dataset, optimizer=optimizer, strategy=Finetune(), **options)
