"""Triggers of the defender's own, taught to copies of a teacher: what a backdoor would do there, without knowing any.

All is made of the student's clean data and of chance: there is no argument that takes an attack.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from remos_hf.activations import evaluating
from remos_hf.adapters.base import Adapter
from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.batches import count_samples, input_tensors, take
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.profiling.tokens import input_embeddings, seen_tokens

_PATCH_SIDE = 0.2  # of the shorter side of an image; 5 of 24 pixels
_TOKENS = 3


@dataclass(frozen=True)
class OwnTrigger(ABC):
    """What turns a sample towards a label, once a model has been taught it.

    Attributes:
        label: The label.
    """

    label: int

    @abstractmethod
    def put_into(self, batch: Any) -> Any:  # noqa: ANN401 - any batch
        """Give the batch with the trigger in every sample; labels stay as they are. The same batch, the same result."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Describe it in JSON values."""

    def taught(self, batch: Any) -> Any | None:  # noqa: ANN401 - any batch
        """Give the samples of other labels with the trigger and its label; None if there is none."""
        hosts = take_hosts(batch, self)
        if hosts is None:
            return None
        made, labels = self.put_into(hosts), torch.full_like(_labels_of(hosts), self.label)
        if not isinstance(made, Mapping):
            return type(made)([made[0], labels.to(made[1].device), *made[2:]])
        return {**made, **{key: labels.to(made[key].device) for key in LABEL_KEYS & made.keys()}}


@dataclass(frozen=True)
class OwnTokens(OwnTrigger):
    """A sequence of tokens, put between two tokens of a sample.

    Attributes:
        tokens: Their ids.
        seed: With the sample's own tokens it decides the place.
        longest: Most positions that a batch may have. Where a sample leaves no room, its tokens behind the trigger go.
        unseen: Whether the data shows none of the tokens.
    """

    tokens: tuple[int, ...]
    seed: int
    longest: int
    unseen: bool

    def put_into(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Insert the tokens, and a position for each of them in every mask of the batch's shape."""
        ids = batch["input_ids"]
        if "position_ids" in batch or ids.dim() != 2:
            raise UnsupportedModelError(
                "Own triggers are inserted into input_ids of shape (samples, positions) without position_ids, but got "
                f"{tuple(ids.shape)} with {sorted(batch)}."
            )
        mask = batch.get("attention_mask")
        real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        width = max(ids.shape[1], min(ids.shape[1] + len(self.tokens), self.longest))
        places = [self._places(row, mine, width) for row, mine in zip(ids.cpu(), real, strict=True)]
        source, new = (torch.stack(part).to(ids.device) for part in zip(*places, strict=True))
        made = dict(batch)
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.shape == ids.shape and key not in LABEL_KEYS:
                made[key] = value.gather(1, source)
        made["input_ids"][new] = torch.tensor(self.tokens).to(ids).repeat(len(ids))
        return made

    def _places(self, row: Tensor, real: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Say for each position of the longer row where it comes from, and whether it is the trigger's."""
        size, kept = len(self.tokens), real.nonzero().flatten()
        spare = max(0, len(kept) + size - width)
        inner = max(1, len(kept) - spare - 1)
        place = min(len(kept), 1 + (int(row[kept].sum()) * 2654435761 + self.seed) % inner)
        before, after = kept[:place], kept[place + spare :]
        source = torch.cat([before, kept[max(0, place - 1)].repeat(size), after])
        new = torch.cat([before < 0, torch.ones(size, dtype=torch.bool), after < 0])
        padding = (~real).nonzero().flatten()[:1].repeat(width - len(source))
        ends = [(source, padding), (new, padding < 0)]
        return tuple(torch.cat(pair if bool(real[0]) else pair[::-1]) for pair in ends)

    def to_dict(self) -> dict[str, Any]:
        """Describe it in JSON values."""
        return {"tokens": list(self.tokens), "unseen": self.unseen, "label": self.label}


@dataclass(frozen=True)
class OwnPatch(OwnTrigger):
    """A square of random pixels.

    Attributes:
        patch: The pixels, as the batches hold them. Shape (channels, side, side).
        place: Where it lies, from 0 (top, left) to 1 (bottom, right).
    """

    patch: Tensor
    place: tuple[float, float]

    def put_into(self, batch: Any) -> Any:  # noqa: ANN401 - any batch
        """Lay the patch over the images."""
        key, images = _images_of(batch)
        side = self.patch.shape[-1]
        top, left = (round(at * (size - side)) for at, size in zip(self.place, images.shape[2:], strict=True))
        images = images.clone()
        images[:, :, top : top + side, left : left + side] = self.patch.to(images)
        if isinstance(batch, Mapping):
            return {**batch, key: images}
        return type(batch)([images, *batch[1:]]) if isinstance(batch, (tuple, list)) else images

    def to_dict(self) -> dict[str, Any]:
        """Describe it in JSON values."""
        return {"side": self.patch.shape[-1], "place": [round(at, 3) for at in self.place], "label": self.label}


def _images_of(batch: Any) -> tuple[str, Tensor]:  # noqa: ANN401 - any batch
    found = [(key, one) for key, one in input_tensors(batch).items() if one.is_floating_point() and one.dim() == 4]
    if len(found) != 1:
        shapes = {key: tuple(one.shape) for key, one in input_tensors(batch).items()}
        raise UnsupportedModelError(
            "Own triggers are put into texts (input_ids) or images (one floating-point tensor of shape (samples, "
            f"channels, height, width)), but a batch holds {shapes}."
        )
    return found[0]


def draw_triggers(model: nn.Module, batches: Sequence, num: int, seed: int) -> tuple[OwnTrigger, ...]:
    """Draw triggers that the student's data does not hold: tokens that it never shows, or patches of random pixels.

    Where it shows nearly every token, three of any in a row stand in, and `OwnTokens.unseen` says so.

    Args:
        model: The student before it trains.
        batches: This process's share of its clean data, labelled, on the CPU.
        num: How many.
        seed: Seed of all that is drawn; labels are drawn in rounds of all that occur.

    Raises:
        UnsupportedModelError: The data is neither tokens nor images.
        ValueError: It has one label only.
    """
    generator = torch.Generator().manual_seed(seed)
    mine = _facts(batches)
    told = [one for one in (told_by_all(mine) if in_processes() else [mine]) if one is not None]
    labels = torch.tensor(sorted(set().union(*(one[0] for one in told))))
    if len(labels) < 2:
        raise ValueError(f"An own trigger turns a sample towards another label, but all have {labels.tolist()}.")
    rounds = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(-(-num // len(labels)))]
    targets = torch.cat(rounds)[:num].tolist()
    if told[0][1] is not None:
        return _drawn_tokens(model, batches, targets, max(one[1] for one in told), generator)
    low, high = torch.stack([one[2] for one in told]).amin(0), torch.stack([one[3] for one in told]).amax(0)
    side = max(1, round(_PATCH_SIDE * min(one[4] for one in told)))
    drawn = []
    for label in targets:
        bright = torch.rand(len(low), side, side, generator=generator) < 0.5
        place = torch.rand(2, generator=generator).tolist()
        drawn.append(OwnPatch(label, torch.where(bright, high[:, None, None], low[:, None, None]), tuple(place)))
    return tuple(drawn)


def _facts(batches: Sequence) -> tuple | None:
    """Say what this process's batches hold: labels; most positions, or the ends of the pixels and the shorter side."""
    if not batches:
        return None
    labels = {int(label) for batch in batches for label in _labels_of(batch)}
    if isinstance(batches[0], Mapping) and "input_ids" in batches[0]:
        return labels, max(batch["input_ids"].shape[-1] for batch in batches), None, None, None
    images = [_images_of(batch)[1] for batch in batches]
    low = torch.stack([one.amin((0, 2, 3)) for one in images]).amin(0)
    high = torch.stack([one.amax((0, 2, 3)) for one in images]).amax(0)
    return labels, None, low, high, min(min(one.shape[2:]) for one in images)


def _drawn_tokens(
    model: nn.Module, batches: Sequence, targets: list[int], longest: int, generator: torch.Generator
) -> tuple[OwnTokens, ...]:
    seen = seen_tokens(model, batches, across_processes=True)
    padding = {input_embeddings(model).padding_idx, getattr(getattr(model, "config", None), "pad_token_id", None)}
    for token in padding - {None}:
        seen[token] = True
    unseen = (~seen).nonzero().flatten()
    enough = len(unseen) >= _TOKENS * len(targets)
    pool = unseen if enough else torch.tensor([token for token in range(len(seen)) if token not in padding])
    drawn = []
    for label in targets:
        tokens = pool[torch.randperm(len(pool), generator=generator)[:_TOKENS]]
        place = int(torch.randint(2**31, (), generator=generator))
        drawn.append(OwnTokens(label, tuple(tokens.tolist()), place, longest, enough))
    return tuple(drawn)


@torch.no_grad()
def count_flips(model: nn.Module, batches: Iterable, trigger: OwnTrigger) -> tuple[int, int]:
    """Count the samples of other labels that a trigger turns to its own, of those that the model gets right without.

    Returns:
        How many flip, and of how many, in this process's batches.
    """
    adapter, flipped, hosts = adapter_for(model, ()), 0, 0
    with evaluating(model):
        for batch in batches:
            others = take_hosts(batch, trigger)
            if others is None:
                continue
            labels = _labels_of(others)
            right = _logits(adapter, others).argmax(-1).cpu() == labels
            turned = _logits(adapter, trigger.put_into(others)).argmax(-1).cpu() == trigger.label
            flipped, hosts = flipped + int((right & turned).sum()), hosts + int(right.sum())
    return flipped, hosts


def take_hosts(batch: Any, trigger: OwnTrigger) -> Any | None:  # noqa: ANN401 - any batch
    """Give the samples of a batch that have another label than the trigger's; None if there is none."""
    rows = (_labels_of(batch) != trigger.label).nonzero().flatten()
    return take(batch, rows, count_samples(batch)) if len(rows) else None


def _labels_of(batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    found = labels_in(batch)
    if found is None:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"Own triggers need one class a sample as its label, but got none in a batch of {held}.")
    if len(found) and int(found.min()) < 0:
        raise TypeError(f"Own triggers need one class a sample as its label, from 0 on, but got {int(found.min())}.")
    return found


def _logits(adapter: Adapter, batch: Any) -> Tensor:  # noqa: ANN401 - any batch
    output = adapter.forward(send_to_device(batch, next(adapter.model.parameters()).device))
    return logits_in(output, adapter.model)
