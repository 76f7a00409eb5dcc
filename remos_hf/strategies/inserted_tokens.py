"""Room for tokens in the middle of texts: a batch with more positions, and which of them the tokens take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.perturbed_inputs import real_positions


@dataclass(frozen=True)
class Slots:
    """Where inserted tokens stand in a batch.

    Attributes:
        number: int64, (samples, positions): which of a sample's inserted tokens stands there, from 0; -1 for none.
        cut: Samples that lost tokens of their own for want of positions.
    """

    number: Tensor
    cut: int

    def filled(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """Put the embeddings of inserted tokens into their places.

        Args:
            embeddings: (samples, positions, width).
            tokens: (samples, inserted tokens * width).
        """
        of_each = tokens.view(len(tokens), -1, embeddings.shape[-1]).to(embeddings)
        spread = self.number.clamp(min=0)[..., None].expand(-1, -1, embeddings.shape[-1])
        return torch.where(self.number[..., None] >= 0, of_each.gather(1, spread), embeddings)


def room_for_tokens(
    model: nn.Module, batch: Mapping[str, Any], rows: Tensor, count: int, generator: torch.Generator
) -> tuple[dict[str, Any], Slots]:
    """Make room for tokens in some texts of a batch, at a random place behind the first token and before the last.

    Positions that are padding in all texts go. Where a text has no room left, its tokens before the last give way.

    Args:
        model: Its config says how many positions there are, and the padding token.
        batch: With `input_ids`, (samples, positions). It stays as it is.
        rows: Bool, (samples,), on the CPU: the texts that get the tokens.
        count: How many each of them gets.
        generator: On the CPU; draws the places.

    Returns:
        The batch, in the tokens' places the token before them; and which these are.

    Raises:
        UnsupportedModelError: The batch says something of every position that does not move with the tokens.
    """
    tokens = batch["input_ids"]
    _check_no_positions(model, batch, tokens)
    real = real_positions(batch, tokens).cpu()
    positions = torch.arange(real.shape[1])
    first, number = real.int().argmax(1), real.sum(1)
    left = bool((first > 0).any())
    limit = number.clamp(min=_positions_of(model) or int(number.max()) + count)
    length = torch.where(rows, torch.minimum(number + count, limit), number)
    own = torch.where(rows, length - count, number)  # of its own tokens, what is left
    if bool((own < 1).any()):
        raise UnsupportedModelError(
            f"{count} inserted tokens leave no room in the {int(limit.max())} positions of {type(model).__name__}. "
            "Insert fewer: tokens=."
        )
    place = 1 + (torch.rand(len(own), generator=generator) * (own - 1).clamp(min=1)).long()

    width = int(length.max())
    at = torch.arange(width)[None] - (width - length if left else 0 * length)[:, None]  # place in the text itself
    there = (at >= 0) & (at < length[:, None])
    slot = torch.where(rows[:, None] & there, at - place[:, None], -1)
    behind = slot >= count
    slot = torch.where(behind, -1, slot.clamp(min=-1))
    source = torch.where(behind, at - count, torch.where(slot >= 0, place[:, None] - 1, at))
    last = (at == length[:, None] - 1) & (slot < 0)
    source = torch.where(last, number[:, None] - 1, source)
    index = (first[:, None] + source).clamp(0, len(positions) - 1).to(tokens.device)
    there = there.to(tokens.device)
    made = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape == tokens.shape and not key.startswith(("decoder", "label")):
            made[key] = value.gather(1, index).masked_fill(~there, _padding_of(model) if key == "input_ids" else 0)
    made["attention_mask"] = there.to(batch.get("attention_mask", tokens).dtype)
    return made, Slots(slot.to(tokens.device), int((length < number + count)[rows].sum()))


def _check_no_positions(model: nn.Module, batch: Mapping[str, Any], tokens: Tensor) -> None:
    labels, decodes = batch.get("labels"), getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    of_tokens = isinstance(labels, Tensor) and not decodes and labels.shape == tokens.shape
    if of_tokens or "position_ids" in batch:
        raise UnsupportedModelError(
            f"Tokens are inserted into texts that have one label each, but {'labels' if of_tokens else 'position_ids'} "
            "of this batch says something of every position. Add to all tokens instead: tokens=0."
        )


def _padding_of(model: nn.Module) -> int:
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return padding if isinstance(padding, int) and padding >= 0 else 0


def _positions_of(model: nn.Module) -> int | None:
    """Give how many positions a model has; None if nothing limits them."""
    config = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    table = next((one for name, one in model.named_modules() if name.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return found if padding is None else found - padding - 1  # RoBERTa counts from behind its padding
