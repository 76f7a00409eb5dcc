"""A batch of the student's data: how many samples it holds, some of them, its bytes. Packed rows become samples."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from remos_hf.adapters.base import inputs_of
from remos_hf.adapters.sequences import LABEL_KEYS

# Values of each sample that go into the data fingerprint: enough to tell data sets apart, too few to cost time.
_FINGERPRINT_VALUES = 1024
# One of these is there in what transformers' models read, and its first axis is the sample.
_MAIN_KEYS = (
    "input_ids",
    "inputs_embeds",
    "input_values",
    "input_features",
    "pixel_values",
    "attention_mask",
    "decoder_input_ids",
)
# What collators of packed rows add for attention kernels, and what no longer holds when the rows are taken apart.
_PACKING_KEYS = ("position_ids", "seq_idx", "attention_mask")
_BOUNDARY_KEYS = ("cu_seq_lens_q", "cu_seqlens")


def input_tensors(batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any batch
    """Give a batch's tensors by key, labels left out; those of an (inputs, ...) tuple are its "inputs"."""
    if isinstance(batch, Mapping):
        return {key: batch[key] for key in sorted(batch) if isinstance(batch[key], Tensor) and key not in LABEL_KEYS}
    inputs = inputs_of(batch)
    return {"inputs": inputs} if isinstance(inputs, Tensor) else {}


def count_samples(batch: Any) -> int:  # noqa: ANN401 - any batch
    """Count the samples of a batch.

    Of what transformers' models read, the tokens (or else sounds, images) decide; otherwise all tensors must agree.
    Tensors without an axis say nothing.

    Raises:
        TypeError: There is no tensor.
        ValueError: Tensors disagree, or one is empty.
    """
    tensors = {key: tensor for key, tensor in input_tensors(batch).items() if tensor.dim()}
    if not tensors:
        raise TypeError(
            "A batch must be a tensor, an (inputs, ...) tuple, or a mapping that holds tensors, as Trainer makes them, "
            f"but {_held_instead(batch)}"
        )
    main = next((key for key in _MAIN_KEYS if key in tensors), None)
    if main is None:
        samples, must_agree = len(next(iter(tensors.values()))), list(tensors)
    else:
        samples = len(tensors[main])
        # Positions of packed rows and lengths for attention kernels have an axis of their own; activations have not.
        must_agree = [key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1]
    if any(len(tensors[key]) != samples for key in must_agree):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        raise ValueError(
            f"The tensors of a batch disagree on how many samples it holds: {shapes}. Give each sample one row in "
            "every tensor (as many images as texts), or batches of one sample."
        )
    first = main or next(iter(tensors))
    if not samples or (main is not None and not tensors[main].numel()):
        raise ValueError(
            f"'{first}' has the shape {tuple(tensors[first].shape)}: no sample of the batch holds anything."
        )
    return samples


def _held_instead(batch: Any) -> str:  # noqa: ANN401 - whatever was given
    """Say what a batch without tensors holds, and how tensors are made of it."""
    held = dict(batch) if isinstance(batch, Mapping) else {"": batch}
    inputs = {key: value for key, value in held.items() if key not in (*LABEL_KEYS, "label")}
    if held and not inputs:
        return (
            f"got only labels ({', '.join(map(repr, held))}). Trainer leaves out columns that the model's forward does "
            "not take: tokenize texts before (dataset.map), and of images make pixel_values in the data_collator, with "
            "remove_unused_columns=False."
        )
    for key, value in inputs.items():
        first = value[0] if isinstance(value, (list, tuple)) and len(value) else value
        where = f" in {key!r}" if key else ""
        if isinstance(first, str):
            return (
                f"got text{where} ({first[:40]!r}). Tokenize it first: tokenizer(texts, padding=True, truncation=True, "
                "return_tensors='pt') gives a batch."
            )
        if isinstance(first, Image):
            return (
                f"got an image{where}. Make pixel_values of images first: the teacher's image processor does, or "
                "image_input_of(teacher)."
            )
        if isinstance(first, (int, float, list)):
            return f"got lists{where}. Make tensors of them: DataLoader(samples, collate_fn=...), set_format('torch')."
    return f"got {type(batch).__name__}."


def take(batch: Any, rows: Tensor, samples: int) -> Any:  # noqa: ANN401 - any batch
    """Give some samples of a batch: in every tensor whose first axis is the sample. Others stay whole.

    Args:
        batch: The batch.
        rows: int64 numbers of the samples, in the order wanted, on any device.
        samples: How many the batch holds.
    """

    def some(value: Any) -> Any:  # noqa: ANN401 - whatever a batch holds
        mine = isinstance(value, Tensor) and value.dim() and len(value) == samples
        return value[rows.to(value.device)] if mine else value

    if isinstance(batch, Mapping):
        return {key: some(value) for key, value in batch.items()}
    return type(batch)([some(value) for value in batch]) if isinstance(batch, (tuple, list)) else some(batch)


def first_samples(batches: Iterable, left: int) -> Iterator:
    """Give batches until so many samples were given; the last one is cut."""
    for batch in batches:
        size = count_samples(batch)
        yield batch if size <= left else take(batch, torch.arange(left), size)
        left -= size
        if left <= 0:
            return


def digest(batch: Any) -> int:  # noqa: ANN401 - any batch
    """Fingerprint a batch's inputs: some values of every sample."""
    fingerprint = hashlib.sha256()
    for key, tensor in input_tensors(batch).items():
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
        some = rows[:, :: max(1, rows.shape[1] // _FINGERPRINT_VALUES)].contiguous().cpu()
        fingerprint.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        fingerprint.update(memoryview(some.view(torch.uint8).flatten().numpy()))
    return int(fingerprint.hexdigest(), 16)


def unpacked(batches: Iterable) -> Iterator:
    """Take packed rows apart: every sequence of a row becomes a sample, padded on the right. Other batches pass as is.

    A row is packed where `position_ids` start again at 0 within it, or where `cu_seq_lens_q` says so, as TRL's packing
    and transformers' padding-free collators make them. A model that reads such rows keeps their sequences apart, so
    each one alone gives the same activations. No batch made here has more positions than twice the packed one.
    """
    for batch in batches:
        starts = _starts(batch)
        if starts is None:
            yield batch
            continue
        real, rows, firsts, lengths = starts
        order = torch.argsort(lengths, stable=True)  # alike ones together: little padding
        limit = max(int(lengths.max()), batch["input_ids"].numel())
        for some in _chunks(order.tolist(), lengths.tolist(), limit):
            yield _sequences(batch, real, rows[some], firsts[some], lengths[some])


def _starts(batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # noqa: ANN401 - any batch
    """Find which positions are real, and row, first position, length of every sequence; None if no row holds two."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.numel():
        return None
    mask, places = batch.get("attention_mask"), batch.get("position_ids")
    real = torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        real = mask.bool()
    bounds = next((batch[key] for key in _BOUNDARY_KEYS if isinstance(batch.get(key), Tensor)), None)
    first = torch.zeros_like(real)
    if isinstance(places, Tensor) and places.shape == tokens.shape:
        first = places == 0
    elif bounds is not None and len(tokens) == 1:
        first[0, bounds.flatten()[:-1].long().to(tokens.device)] = True
    else:
        return None
    first = (first | (real.cumsum(1) == 1)) & real
    if bounds is None and not bool((first.sum(1) > 1).any()):
        return None
    rows, firsts = first.cpu().nonzero(as_tuple=True)
    ends = torch.full_like(firsts, tokens.shape[1])
    same_row = rows[1:] == rows[:-1]
    ends[:-1][same_row] = firsts[1:][same_row]
    return real, rows, firsts, ends - firsts


def _chunks(order: list[int], lengths: list[int], limit: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for one in order:
        if chunk and lengths[one] * (len(chunk) + 1) > limit:
            yield chunk
            chunk = []
        chunk.append(one)
    yield chunk


def _sequences(batch: Mapping, real: Tensor, rows: Tensor, firsts: Tensor, lengths: Tensor) -> dict:
    tokens = batch["input_ids"]
    steps = torch.arange(int(lengths.max()))
    inside = (steps < lengths[:, None]).to(tokens.device)
    places = (firsts[:, None] + steps).clamp(max=tokens.shape[1] - 1).to(tokens.device)
    rows = rows[:, None].to(tokens.device)
    real = real[rows, places] & inside
    found = {"attention_mask": real.long()}
    for key, value in batch.items():
        if key in _PACKING_KEYS or not isinstance(value, Tensor) or value.shape[:2] != tokens.shape:
            continue
        fill = -100 if key in LABEL_KEYS else 0
        apart = value[rows, places]
        found[key] = apart.masked_fill(~real.reshape(*real.shape, *[1] * (apart.dim() - 2)), fill)
    return found
