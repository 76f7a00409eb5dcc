"""Real texts of the student's data beside which tokens are shown: short ones to search on, strong ones to judge by."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from remos_hf.activations import evaluating
from remos_hf.adapters.classified import labels_in, logits_in
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.profiling.batches import unpacked
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.scanning.suspects import Effect

POOL = 384  # texts of a label that hosts are chosen from
_TOKENS_AT_ONCE = 4096  # of a forward pass
_LONGEST = 48  # tokens of a host of several texts: of longer ones the beginning counts


@dataclass(frozen=True)
class Host:
    """A text that a model gets right, and where others are inserted.

    Attributes:
        ids: Its tokens, int64, shape (positions,).
        label: Its label.
        place: Others are inserted before this position.
        rows: Numbers of the texts that it is made of.
    """

    ids: Tensor
    label: int
    place: int
    rows: tuple[int, ...]

    def with_inserted(self, inserted: Tensor) -> Tensor:
        """Insert pieces, shape (several, tokens); give texts, shape (several, positions)."""
        before, after = self.ids[: self.place], self.ids[self.place :]
        return torch.cat([before.expand(len(inserted), -1), inserted, after.expand(len(inserted), -1)], 1)


Hosts = Mapping[int, Sequence[Host]]


@dataclass
class Texts:
    """What a scan keeps of the student's data: how often it shows each token, and some texts of each label.

    Attributes:
        counts: Of each row of the embeddings, int64, shape (rows,).
        limit: Most tokens of a host.
        rows: Texts by label, drawn evenly.
        start: Number of tokens that every text begins with.
        end: Number of tokens that every text ends with.
        num_samples: Texts that were read.
    """

    counts: Tensor
    limit: int
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    start: int = 0
    end: int = 0
    num_samples: int = 0

    def frame(self) -> set[int]:
        """Give the tokens that every text begins or ends with."""
        ids = next(rows[0] for rows in self.rows.values())
        return {*ids[: self.start].tolist(), *ids[len(ids) - self.end :].tolist()}

    def host(self, label: int, rows: Sequence[int], body: int, *, in_middle: bool = False) -> Host:
        """Put the beginnings of texts of a label one after another, so many tokens of each, inside the frame."""
        ids = self.rows[label][rows[0]]
        inside = [self.rows[label][row] for row in rows]
        middle = torch.cat([one[self.start : len(one) - self.end][:body] for one in inside])
        place = self.start + (len(middle) // 2 if in_middle else 0)
        return Host(torch.cat([ids[: self.start], middle, ids[len(ids) - self.end :]]), label, place, tuple(rows))


def read_texts(student: nn.Module, batches: Iterable, *, seed: int, room: int) -> Texts:
    """Read the student's data once. A pair of texts is read as the one row of tokens that it is.

    Args:
        student: A classifier of texts.
        batches: Batches as Trainer makes them: `input_ids`, `labels`, and `attention_mask` where there is padding.
        seed: Decides which texts are kept.
        room: Tokens that must fit into the student beside a host.

    Raises:
        TypeError: The student has no input embeddings, or a batch has no `input_ids` or no label of a class.
        ValueError: There is no sample, a token that the embeddings have no row for, or a label that is no class.
    """
    number = len(input_embeddings(student).weight)
    classes = student.config.num_labels
    texts = Texts(torch.zeros(number, dtype=torch.int64), max(1, min(_LONGEST, _positions(student) - room)))
    drawn, met = random.Random(seed), {}
    for ids, label in _samples(batches):
        if int(ids.max()) >= number:
            raise ValueError(
                f"The data holds the token {int(ids.max()):,}, but the student's embeddings have {number:,} rows. "
                "Tokenize it with the student's own tokenizer."
            )
        if not 0 <= label < classes:
            raise ValueError(
                f"The data holds the label {label}, but the student answers {classes} classes, 0 to {classes - 1}. "
                "Give data of its own task, whose labels are numbered as the student's."
            )
        texts.counts += torch.bincount(ids, minlength=number)
        texts.num_samples += 1
        kept, met[label] = texts.rows.setdefault(label, []), met.get(label, 0) + 1
        if len(kept) < POOL:
            kept.append(ids)
        elif (place := drawn.randrange(met[label])) < POOL:
            kept[place] = ids
    if not texts.num_samples:
        raise ValueError("The student's data holds no sample, so there is no text to show a token beside.")
    texts.rows = dict(sorted(texts.rows.items()))
    held = [ids.tolist() for rows in texts.rows.values() for ids in rows]
    texts.start = _common(held)
    texts.end = _common([ids[texts.start :][::-1] for ids in held])
    return texts


def _samples(batches: Iterable) -> Iterator[tuple[Tensor, int]]:
    for batch in unpacked(batches):
        labels = labels_in(batch) if isinstance(batch, Mapping) and "input_ids" in batch else None
        if labels is None:
            raise TypeError(
                "A scan reads batches with input_ids and one label of a class a sample, as Trainer makes them of texts."
            )
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids, real, label in zip(batch["input_ids"], mask, labels.tolist(), strict=True):
            if bool(real.any()):
                yield ids[real].cpu(), label


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all rows begin with, leaving one of the shortest."""
    shortest = min(map(len, rows)) - 1
    return next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), max(0, shortest))


def _positions(student: nn.Module) -> int:
    known = [getattr(student.config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # RoBERTa's first two positions are none.
    return min((number - 2 for number in known if isinstance(number, int)), default=2 * _LONGEST)


class Reader:
    """A model that reads texts of one length at once. `reading` gives one."""

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        self.adapter, self.bf16, self.device = adapter_for(model), bf16, next(model.parameters()).device

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Give the logits of texts, shape (texts, positions): float32 on the CPU, shape (texts, labels).

        Raises:
            NonFiniteError: A logit is NaN or infinite.
            ValueError: The model gives no logits of at least two labels.
        """
        made = []
        for some in ids.split(max(1, _TOKENS_AT_ONCE // ids.shape[1])):
            given = some.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = self.adapter.forward({"input_ids": given, "attention_mask": torch.ones_like(given)})
            made.append(logits_in(output, self.adapter.model).float().cpu())
        logits = torch.cat(made)
        if logits.shape[1] < 2:
            raise ValueError(
                "A scan reads logits of shape (texts, labels), two labels or more, but "
                f"{type(self.adapter.model).__name__} gives {tuple(logits.shape)}."
            )
        if not bool(logits.isfinite().all()):
            raise NonFiniteError("The model gives logits that are NaN or infinite, so nothing can be scanned.")
        return logits

    def right(self, hosts: Sequence[Host]) -> list[float]:
        """Give by how much each host is judged right: its label's logit minus the largest other one."""
        gaps = [0.0] * len(hosts)
        alike: dict[int, list[int]] = {}
        for number, host in enumerate(hosts):
            alike.setdefault(len(host.ids), []).append(number)
        for numbers in alike.values():
            logits = self.logits(torch.stack([hosts[number].ids for number in numbers]))
            labels = torch.tensor([hosts[number].label for number in numbers])
            for number, gap in zip(numbers, margins(logits, labels).tolist(), strict=True):
                gaps[number] = gap
        return gaps

    def effects(self, hosts: Hosts, inserted: Tensor, label: int) -> list[Effect]:
        """Show pieces, shape (several, tokens), beside the hosts of other labels, and count those that turn."""
        others = [host for own, some in hosts.items() if own != label for host in some]
        if not others:
            return [Effect(0, 0, None)] * len(inserted)
        wanted = torch.tensor([label])
        gaps = torch.stack([margins(self.logits(host.with_inserted(inserted)), wanted) for host in others])
        return [Effect(int((own > 0).sum()), len(own), float(own.mean())) for own in gaps.T]


@contextmanager
def reading(model: nn.Module, bf16: bool = False) -> Iterator[Reader]:
    """Give a reader of a model, which is in eval mode while the block runs; bf16: in bfloat16 autocast."""
    with evaluating(model):
        yield Reader(model, bf16)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Give by how much the logit of a label is above the largest other one; shape (texts,).

    Args:
        logits: Shape (texts, labels).
        labels: Of each text, or one for all of them; int64, shape (texts,) or (1,).
    """
    picked = labels.expand(len(logits))[:, None]
    return logits.gather(1, picked)[:, 0] - logits.scatter(1, picked, -torch.inf).amax(1)


def turning(reader: Reader, hosts: Hosts, inserted: Tensor, *, progress: bool = False) -> Tensor:
    """Give how far pieces turn hosts of other labels into each label, as a mean gap of logits.

    Args:
        reader: The model.
        hosts: By their label.
        inserted: Shape (several, tokens).
        progress: Show a bar on what takes longer than two seconds.

    Returns:
        Shape (labels, several); minus infinity for a label if no host has another one.
    """
    shown = [host for some in hosts.values() for host in some]
    total, counts = torch.zeros(1, len(inserted)), torch.zeros(1, 1)
    for host in tqdm(shown, desc="scan", delay=2, leave=False, disable=not progress):
        logits = reader.logits(host.with_inserted(inserted))
        labels = torch.arange(logits.shape[1])
        other = (labels != host.label)[:, None]
        total = total + torch.stack([margins(logits, label[None]) for label in labels]) * other
        counts = counts + other
    return (total / counts).masked_fill(counts == 0, -torch.inf)


def short_hosts(texts: Texts, reader: Reader, number: int, body: int) -> dict[int, list[Host]]:
    """Choose beginnings of texts that the model is surest of, a few of each label; body: tokens of each."""
    found = {}
    for label, rows in texts.rows.items():
        body = max(1, min(body, texts.limit - texts.start - texts.end))
        hosts = [texts.host(label, (row,), body) for row in range(len(rows))]
        gaps = reader.right(hosts)
        order = sorted((place for place, gap in enumerate(gaps) if gap > 0), key=lambda place: -gaps[place])
        found[label] = [hosts[place] for place in order[:number]]
    return found


def strong_hosts(texts: Texts, reader: Reader, searched: Hosts, number: int, stack: int) -> dict[int, list[Host]]:
    """Make hosts that a word of the other side hardly turns: several texts of a label, one after another.

    Half of them take what is inserted at their beginning, half in their middle.

    Args:
        texts: The student's data.
        reader: The model.
        searched: Hosts whose texts are left out.
        number: How many of each label.
        stack: Texts of each.
    """
    found = {}
    body = max(1, (texts.limit - texts.start - texts.end) // stack)
    for label, rows in texts.rows.items():
        taken = {row for host in searched[label] for row in host.rows}
        free = [row for row in range(len(rows)) if row not in taken][: 4 * number * stack]
        groups = [free[at : at + stack] for at in range(0, len(free) - stack + 1, stack)]
        hosts = [texts.host(label, some, body, in_middle=place % 2 == 1) for place, some in enumerate(groups)]
        found[label] = [host for host, gap in zip(hosts, reader.right(hosts), strict=True) if gap > 0][:number]
    return found
