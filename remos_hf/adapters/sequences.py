"""The sequences of a batch (tokens, sound, a decoder's tokens): which positions are real, and shorter batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remos_hf.errors import UnsupportedModelError

# Keys of a batch that only serve the loss.
LABEL_KEYS = frozenset({"label", "labels", "label_ids"})
# What a sequence runs along, of the inputs of transformers' models.
_TOKEN_KEYS = ("input_ids", "inputs_embeds", "input_values", "input_features")
_PADDING_SUFFIX = "key_padding_mask"  # torch's own layers: True is padding
# Masks that hide nothing from a model for being padding.
_OTHER_MASKS = frozenset(
    {
        "attention_mask",
        "bool_masked_pos",
        "completion_mask",  # TRL's: which tokens count in the loss
        "cross_attn_head_mask",
        "decoder_attention_mask",
        "decoder_head_mask",
        "global_attention_mask",
        "head_mask",
        "perm_mask",
        "special_tokens_mask",
    }
)


@dataclass(frozen=True)
class Sequence:
    """One sequence that runs through a model.

    Attributes:
        shape: (samples, positions), or (samples, choices, positions).
        real: Bool, of that shape, False where a position is padding; None where the batch says nothing of padding.
    """

    shape: torch.Size
    real: Tensor | None


def sequences_of(batch: Any, *, decoder: bool = False) -> dict[str, Sequence]:  # noqa: ANN401 - any batch
    """Find the sequences of a batch by name: "input", "decoder", or the name of a `key_padding_mask`.

    Args:
        batch: A batch; only mappings say what their tensors are.
        decoder: Whether the model has a decoder that is fed with `labels` or `decoder_input_ids`.

    Raises:
        UnsupportedModelError: A mask cannot be laid on positions, so that padding would count.
    """
    if not isinstance(batch, Mapping):
        return {}
    found = {key: Sequence(value.shape, ~value.bool()) for key, value in _tensors(batch) if _hides(key, value)}
    main = _input_sequence(batch)
    if main is not None:
        found["input"] = main
    if decoder:
        own = _decoder_sequence(batch)
        # Where both grow with the input, the decoder's own mask is the one that fits.
        found = found if own is None else {"decoder": own, **found}
    for key, value in _tensors(batch):
        if key.endswith("mask") and key not in _OTHER_MASKS and key not in found and not bool(value.bool().all()):
            raise UnsupportedModelError(
                f"'{key}' of shape {tuple(value.shape)} hides part of the batch, and what it hides in each layer is "
                "not known, so padding would count. Give batches without padding (images of one size), or the padding "
                "of tokens as attention_mask, 1 where a token is real."
            )
    return found


def _tensors(batch: Mapping) -> list[tuple[str, Tensor]]:
    return [(str(key), value) for key, value in batch.items() if isinstance(value, Tensor)]


def _hides(key: str, value: Tensor) -> bool:
    return key.endswith(_PADDING_SUFFIX) and value.dim() == 2 and value.dtype == torch.bool


def _input_sequence(batch: Mapping) -> Sequence | None:
    tokens = next((batch[key] for key in _TOKEN_KEYS if isinstance(batch.get(key), Tensor)), None)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        fits = mask.dim() == 2 or (tokens is not None and mask.dim() == 3 and mask.shape == tokens.shape[:3])
        return Sequence(mask.shape, _real(mask, "attention_mask", fits))
    if isinstance(batch.get("input_ids"), Tensor) and batch["input_ids"].dim() in (2, 3):
        return Sequence(batch["input_ids"].shape, None)
    return None


def _decoder_sequence(batch: Mapping) -> Sequence | None:
    mask, tokens, labels = (batch.get(key) for key in ("decoder_attention_mask", "decoder_input_ids", "labels"))
    if isinstance(mask, Tensor):
        return Sequence(mask.shape, _real(mask, "decoder_attention_mask", mask.dim() == 2))
    if isinstance(tokens, Tensor):
        return Sequence(tokens.shape, None)
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return Sequence(labels.shape, labels != -100)
    return None


def _real(mask: Tensor, key: str, fits: bool) -> Tensor:
    if not fits:
        raise UnsupportedModelError(
            f"{key} has the shape {tuple(mask.shape)}, so it says who attends to whom, not which positions are real. "
            "Give a mask of the tokens' shape, 1 where a token is real; for packed rows give position_ids that start "
            "at 0 with every sequence, and no mask."
        )
    if mask.is_floating_point() and bool((mask < 0).any()):
        raise UnsupportedModelError(
            f"{key} holds negative values: it is added to attention scores. Give it as 1 where a position is real and "
            "0 where it is padding."
        )
    return mask.bool()


def with_positions(batch: Mapping, name: str, shape: torch.Size, kept: Tensor) -> dict:
    """Give a batch with some positions of one of its sequences.

    Args:
        batch: The batch.
        name: The sequence, as `sequences_of` names it.
        shape: Its shape.
        kept: int64 numbers of the positions to keep, in order; one may be there twice.
    """
    made = {}
    for key, value in batch.items():
        axis = _position_axis(str(key), value, name, shape) if isinstance(value, Tensor) else None
        made[key] = value if axis is None else value.index_select(axis, kept.to(value.device))
    return made


def _position_axis(key: str, value: Tensor, name: str, shape: torch.Size) -> int | None:
    count, size = len(shape), shape[-1]
    if name not in ("input", "decoder"):  # a key_padding_mask, with the tensor that it is named after
        mine = key == name or (value.dim() > 2 and name.startswith(key))
        return next((axis for axis in (1, 0) if mine and value.shape[axis] == size), None)
    of_decoder = key.startswith("decoder_") or key in LABEL_KEYS
    if of_decoder != (name == "decoder"):
        return None
    if key == "input_features":
        return next((axis for axis in (2, 1) if value.dim() == 3 and value.shape[axis] == size), None)
    if value.shape[:count] == shape and (value.dim() == count or not value.is_floating_point() or "embeds" in key):
        return count - 1
    beside = not value.is_floating_point() and value.dim() > 1
    return value.dim() - 1 if beside and value.shape[-2:] in (shape[-2:], (1, size)) else None
