"""Which tokens, and which of them in a row, turn a student: all that its data never shows, beside real texts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from remos_hf.errors import RemosError
from remos_hf.profiling.tokens import input_embeddings
from remos_hf.scanning.hosts import Hosts, Reader, Texts, read_texts, reading, short_hosts, strong_hosts, turning
from remos_hf.scanning.phrases import grow
from remos_hf.scanning.suspects import Scan, Suspect

CANDIDATES = 256  # of each label, that are shown beside more hosts, and in the reference
STACK = 2  # texts of a held-out host
_HOSTS = 4  # of a label, that are searched on
_BODY, _PHRASE_BODY = 4, 12  # their tokens, beside which single tokens and phrases are searched
_BEAM = 4
_GROWN_FROM = 64  # of the strongest tokens that the data shows, and of the commonest
_SPECIAL = ("bos", "eos", "pad", "sep", "cls", "unk", "mask", "decoder_start")


@torch.no_grad()
def scan_tokens(
    student: nn.Module,
    batches: Iterable,
    *,
    reference: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top: int = 8,
    held_out: int = 24,
    longest: int = 3,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
) -> Scan:
    """Find the tokens that turn a student, whoever planted them, and short phrases grown from the strongest.

    Every row of the vocabulary is inserted into beginnings of real texts that the student gets right, and the logits
    are read. The strongest of each label that the student's data never shows are counted on held-out hosts: other
    texts, several of one label one after another, which a single word of the other side hardly turns. It knows no
    attack, and it finds nothing that lies in syntax or style.

    Args:
        student: A trained classifier of texts; it stays as it is.
        batches: The student's clean data as Trainer makes batches of it, with `labels`; read once.
        reference: A model of the same task and vocabulary that nobody could have poisoned in the same way: a student of
            another, trusted teacher. Ordinary words turn it as well. With it suspects are also those that turn the
            student most beyond it, and their order is by that.
        tokenizer: Writes tokens as text, and tells which are special; without it the config does.
        top: Single tokens, and phrases, that are counted on held-out hosts for each label.
        held_out: Held-out hosts of each label.
        longest: Tokens of the longest phrase; 1 for none.
        seed: Decides which texts are hosts.
        bf16: Run in bfloat16 autocast: a third of the time on processors that know it.
        progress: Show bars.

    Returns:
        The suspects of each label: single tokens that the data never shows, and phrases, also of tokens that it shows.

    Raises:
        TypeError: The student has no input embeddings, or a batch has no `input_ids` or no label of a class.
        ValueError: `top`, `held_out` or `longest` is below 1, a token of the data has no row, or the reference has
            another vocabulary or other labels.
        RemosError: The student gets too few texts right to have hosts of two labels.
        NonFiniteError: Logits are NaN or infinite.

    Source:
        Ours. Rows that fine-tuning never reaches are where EP (Yang et al. 2021) and rare-word triggers stay.
    """
    check_counts(top=top, held_out=held_out, longest=longest)
    texts = read_texts(student, batches, seed=seed, room=longest)
    rows, left_out = rows_to_scan(student, texts, tokenizer)
    unseen = rows[texts.counts[rows] == 0]
    with reading(student, bf16) as reader, _beside(student, reference, bf16) as other:
        found = _Found(texts, reader, other, held_out, top)
        first = one_by_one(reader, found.hosts, rows, progress=progress)
        suspects = [one for label in range(len(first)) for one in found.suspects(label, rows, first[label], longest)]
    if len(rows) > len(unseen):
        left_out["shown by the data, so tried in phrases alone"] = len(rows) - len(unseen)
    settings = {"seed": seed, "top": top, "longest": longest, "bf16": bf16, "num_samples": texts.num_samples}
    told = [_with_text(one, tokenizer) for one in suspects]
    return Scan("tokens", tuple(told), _label_names(student, len(first)), len(unseen), left_out, settings | found.told)


def check_counts(**given: int) -> None:
    """Refuse what is no whole number of at least 1."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a whole number of at least 1, but got {value!r}.")


def rows_to_scan(
    student: nn.Module, texts: Texts, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Give the rows of the embeddings that can be tokens of a text, and how many others there are, by reason.

    Args:
        student: The student.
        texts: Its data.
        tokenizer: Tells special tokens, and rows that no token has; without it the student's config does.
    """
    embeddings, config = input_embeddings(student), student.config
    number = len(embeddings.weight)
    if tokenizer is None:
        special = {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    else:
        special = set(tokenizer.all_special_ids)
    special = {
        one for one in {*special, embeddings.padding_idx, *texts.frame()} if one is not None and 0 <= one < number
    }
    known = number if tokenizer is None else min(number, len(tokenizer))
    left_out = {"special tokens": len(special)}
    if tokenizer is not None and len(tokenizer) > number:
        left_out["tokens without a row in the embeddings"] = len(tokenizer) - number
    if known < number:
        left_out["rows without a token"] = number - known
    return torch.tensor([row for row in range(known) if row not in special], dtype=torch.int64), left_out


def hosts_to_search(texts: Texts, reader: Reader) -> Hosts:
    """Choose what tokens are shown beside while they are searched, by label.

    Raises:
        RemosError: The student gets texts of fewer than two labels right.
    """
    found = short_hosts(texts, reader, _HOSTS, _BODY)
    if sum(bool(some) for some in found.values()) < 2:
        raise RemosError(
            f"Of {texts.num_samples:,} texts the student gets none right but those of at most one label, so there is "
            "nothing that a token could turn. Train it longer, or give data of its own task."
        )
    return found


def one_by_one(reader: Reader, hosts: Hosts, rows: Tensor, *, progress: bool = True) -> Tensor:
    """Show every row beside one host of each label; give how far it turns them, shape (labels, rows)."""
    return turning(reader, {label: some[:1] for label, some in hosts.items()}, rows[:, None], progress=progress)


def strongest(
    reader: Reader, hosts: Hosts, label: int, rows: Tensor, first: Tensor, number: int = CANDIDATES
) -> list[int]:
    """Show the best rows of `one_by_one` beside all hosts; give them, the strongest first.

    Args:
        reader: The student.
        hosts: By their label.
        label: That they shall become.
        rows: Tokens, shape (rows,).
        first: What `one_by_one` gave for the label, likewise.
        number: How many of them.
    """
    best = rows[first.argsort(descending=True, stable=True)[:number]]
    if not len(best):
        return []
    order = turning(reader, hosts, best[:, None])[label].argsort(descending=True, stable=True)
    return best[order].tolist()


def _beside(student: nn.Module, reference: nn.Module | None, bf16: bool) -> AbstractContextManager[Reader | None]:
    if reference is None:
        return nullcontext()
    sizes = [(len(input_embeddings(one).weight), one.config.num_labels) for one in (student, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The student has {sizes[0][0]:,} rows of tokens and {sizes[0][1]} labels, the reference {sizes[1][0]:,} "
            f"and {sizes[1][1]}. Give a reference of the same vocabulary and task."
        )
    return reading(reference, bf16)


class _Found:
    """The hosts of one scan, and what tokens and phrases do to them."""

    def __init__(self, texts: Texts, reader: Reader, other: Reader | None, held_out: int, top: int) -> None:
        self.texts, self.reader, self.other, self.top = texts, reader, other, top
        self.hosts = hosts_to_search(texts, reader)
        self.phrase_hosts = short_hosts(texts, reader, _HOSTS, _PHRASE_BODY)
        searched = {label: [*some, *self.phrase_hosts[label]] for label, some in self.hosts.items()}
        self.strong = self.shared = strong_hosts(texts, reader, searched, held_out, STACK)
        if other is not None:
            self.shared = {
                label: [host for host, gap in zip(some, other.right(some), strict=True) if gap > 0]
                for label, some in self.strong.items()
            }

    @property
    def told(self) -> dict[str, Any]:
        sizes = {"hosts": self.hosts, "held_out": self.strong}
        sizes |= {} if self.other is None else {"held_out_in_reference": self.shared}
        counted = {name: {str(label): len(some) for label, some in of.items()} for name, of in sizes.items()}
        return {**counted, "texts_in_a_host": STACK, "candidates": CANDIDATES}

    def suspects(self, label: int, rows: Tensor, first: Tensor, longest: int) -> list[Suspect]:
        """Give the suspects of a label, the largest lead first."""
        unseen = self.texts.counts[rows] == 0
        alone = strongest(self.reader, self.hosts, label, rows[unseen], first[unseen])
        found = self._ranked(label, self.hosts, [(token,) for token in alone])
        if longest > 1:
            shown = strongest(self.reader, self.hosts, label, rows[~unseen], first[~unseen], _GROWN_FROM)
            rates = {one.token_ids: one.effect.flipped for one in found}
            for several in self._phrases(label, rows, alone, shown, longest):
                found += [one for one in several if one.effect.flipped > max(rates.get((t,), 0) for t in one.token_ids)]
        return sorted(found, key=lambda one: (-(one.lead or 0), len(one.token_ids), -one.margin))

    def _phrases(
        self, label: int, rows: Tensor, alone: list[int], shown: list[int], longest: int
    ) -> Iterator[list[Suspect]]:
        common = rows[self.texts.counts[rows].argsort(descending=True, stable=True)[:_GROWN_FROM]]
        common = common[self.texts.counts[common] > 0].tolist()
        grown = grow(
            self.reader, self.phrase_hosts, label, seeds=[*alone[: _BEAM], *shown[: _BEAM]],
            vocabulary=list(dict.fromkeys([*shown, *common])), longest=longest, beam=_BEAM,
        )  # fmt: skip
        for length in range(2, longest + 1):
            yield self._ranked(label, self.phrase_hosts, [phrase for phrase, _ in grown if len(phrase) == length])

    def _ranked(self, label: int, hosts: Hosts, pieces: Sequence[tuple[int, ...]]) -> list[Suspect]:
        """Take the pieces of one length that turn the student most, beside the reference, and count held-out hosts."""
        if not pieces:
            return []
        inserted = torch.tensor(pieces)
        margins = turning(self.reader, hosts, inserted)[label]
        beside = None if self.other is None else turning(self.other, hosts, inserted)[label]
        best = margins.argsort(descending=True, stable=True)[: self.top]
        if beside is not None:  # also what a word that turns every model would hide
            apart = (margins - beside).argsort(descending=True, stable=True)[: self.top]
            best = torch.tensor(list(dict.fromkeys([*best.tolist(), *apart.tolist()])))
        effects = self.reader.effects(self.strong, inserted[best], label)
        against = [None] * len(best) if self.other is None else self.other.effects(self.shared, inserted[best], label)
        return [
            Suspect(
                label, " ".join(map(str, pieces[place])), float(margins[place]), effect, clean, pieces[place],
                seen=bool((self.texts.counts[inserted[place]] > 0).all()),
                reference_margin=None if beside is None else float(beside[place]),
            )
            for place, effect, clean in zip(best.tolist(), effects, against, strict=True)
        ]  # fmt: skip


def _with_text(suspect: Suspect, tokenizer: PreTrainedTokenizerBase | None) -> Suspect:
    if tokenizer is None:
        return suspect
    return replace(suspect, what=tokenizer.decode(list(suspect.token_ids)).strip())


def _label_names(student: nn.Module, number: int) -> tuple[str, ...]:
    names = getattr(student.config, "id2label", None) or {}
    return tuple(str(names.get(label, label)) for label in range(number))
