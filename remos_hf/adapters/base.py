"""The questions we ask of any model, answered for plain torch modules; adapters for libraries refine the answers."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.adapters.sequences import LABEL_KEYS, Sequence, sequences_of
from remos_hf.errors import UnsupportedModelError, nearest
from remos_hf.layers import Layer, sliceable_layers

logger = logging.getLogger(__name__)


class Adapter:
    """A plain torch module, seen through the questions that profiling and slicing ask.

    Args:
        model: The module, before any wrapping (DDP, FSDP, PEFT, compile).
        head: Dotted names of the task-specific last modules, which are never sliced. Nothing says which they are in a
            plain module, so without it every layer is sliceable, and a log line says so.
    """

    def __init__(self, model: nn.Module, head: tuple[str, ...] | None = None) -> None:
        _refuse_wrapped(model)
        self.model = model
        self.head = self._find_head() if head is None else _checked_names(model, head)

    def _find_head(self) -> tuple[str, ...]:
        logger.warning(
            "%s names no head: all its layers can be sliced. Pass head= to spare it.", type(self.model).__name__
        )
        return ()

    def layers(self, *, embeddings: bool = False) -> dict[str, Layer]:
        """Find the weights outside the head that can be sliced, by module name in registration order.

        Args:
            embeddings: Whether the rows of the input embeddings can be given up too.
        """
        names = self._embedding_names() if embeddings else ()
        return sliceable_layers(self.model, exclude=self.head, embeddings=names)

    def feature_layer(self) -> str:
        """Name the module whose input is the penultimate feature: the last Linear of the head.

        Returns:
            Dotted name. The input has the shape (samples, features); (samples, positions, features) where a head reads
            every position, as those of decoders do.

        Raises:
            UnsupportedModelError: There is no head, or no Linear in it.
        """
        return self._last_linear(self.head)

    def channel_axis(self, name: str, feature: Tensor) -> int:
        """Give the axis of channels in what a module returns: the second of four axes, the last of fewer.

        Of four axes it is the last behind a Linear or a LayerNorm, and behind what a model of timm says gives maps with
        channels last (Swin). Nothing tells it of other modules' maps.

        Args:
            name: Dotted name of the module.
            feature: What it returned, samples first.
        """
        last = feature.dim() != 4 or self._gives_channels_last(self.model.get_submodule(name))
        return feature.dim() - 1 if last else 1

    def _gives_channels_last(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or type(module) is nn.LayerNorm  # timm's LayerNorm2d is one by its class

    def _last_linear(self, head: tuple[str, ...]) -> str:
        found = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{root}.") for root in head)
        ]
        if not found:
            reason = f"its head {list(head)} holds no Linear" if head else "it has no head"
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no classifier whose input is its penultimate feature: {reason}. "
                "Give it a head with the number of labels of its task, or name the head that it has."
            )
        return found[-1]

    def _embedding_names(self) -> tuple[str, ...]:
        return tuple(name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding))

    def forward(self, batch: Any, *, hidden_states: bool = False) -> Any:  # noqa: ANN401 - any batch, any output
        """Run the model on a batch as a training loop would give it, leaving labels out.

        Args:
            batch: A tensor, an (inputs, ...) tuple, or a mapping of keyword arguments, already on the model's device.
            hidden_states: Ask for the hidden states in the output.
        """
        extra = {"output_hidden_states": True} if hidden_states else {}
        if isinstance(batch, Mapping):
            return self.model(**{key: value for key, value in batch.items() if not self._is_label(key)}, **extra)
        return self.model(inputs_of(batch), **extra)

    def _is_label(self, key: str) -> bool:
        return key in LABEL_KEYS

    def sequences(self, batch: Any) -> dict[str, Sequence]:  # noqa: ANN401 - any batch
        """Find the sequences that run through the model, and which of their positions are real, by name.

        Args:
            batch: The batch that is about to run.

        Raises:
            UnsupportedModelError: A mask cannot be laid on positions.
        """
        return sequences_of(batch)

    @contextmanager
    def plain_experts(self) -> Iterator[None]:
        """Have stacked experts compute one product an expert while the block runs, so that each can be seen."""
        yield

    def blocks(self) -> dict[str, nn.Module]:
        """Give the repeated blocks between which `output_hidden_states` looks, by name, first to last."""
        raise UnsupportedModelError(
            f"{type(self.model).__name__} is a plain torch module and has no output_hidden_states. Use source='hooks'."
        )

    def writes_to_stream(self, layer: Layer) -> bool:
        """Whether a layer of a block writes to the residual stream (its output is a hidden state's neurons)."""
        raise UnsupportedModelError(f"{type(self.model).__name__} has no residual stream that remos_hf knows.")

    def fresh_weight(self, layer: Layer, generator: torch.Generator) -> Tensor:
        """Draw what a never-trained layer starts with: PyTorch's default. Shape of the weight, on the CPU."""
        fresh = torch.empty(layer.weight.shape)
        if layer.is_embedding:
            return fresh.normal_(generator=generator)
        fan_in = fresh.shape[0] if layer.inputs_first else fresh[0].numel()
        bound = 1 / math.sqrt(fan_in)
        return fresh.uniform_(-bound, bound, generator=generator)


def inputs_of(batch: Any) -> Any:  # noqa: ANN401 - any batch
    """Take the inputs out of a batch that is a tensor or an (inputs, ...) tuple."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _checked_names(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    known = {name for name, _ in model.named_modules()}
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"head names modules that are never sliced, but {missing} are not in {type(model).__name__}."
            f"{nearest(missing, known)} Its direct children are {[name for name, _ in model.named_children()]}."
        )
    return names


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}.")
    wrapper = type(model).__name__
    if wrapper in {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}:
        raise UnsupportedModelError(f"The model is wrapped in {wrapper}. Profile and slice it before it is wrapped.")
    if wrapper.startswith("PeftModel"):
        raise UnsupportedModelError(
            f"The model is a {wrapper}: its adapters are on already. Slice the base model first, then add the adapters "
            "(RemosTrainer(..., peft_config=...) does both in this order)."
        )
    if wrapper == "OptimizedModule":
        raise UnsupportedModelError(
            "The model is compiled, so hooks are not called. Profile and slice it before torch.compile."
        )
