"""Triggers in texts: rare words, or a sentence."""

import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar, Literal

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from remos_hf.defects.backdoor import Backdoor, Trigger
from remos_hf.defects.base import CLEAN_INDEX, ExposedSet
from remos_hf.defects.samples import (
    Data,
    change_share,
    check_columns,
    check_labels,
    checked_text_columns,
    checked_texts,
    generator_for,
    joined_texts,
    resolved_label,
)
from remos_hf.defects.text_attacker import TextAttacker, tokenizer_of


@dataclass(frozen=True)
class TextTrigger(Trigger):
    """A trigger in a text, implanted by poisoning the attacker's data.

    Which samples are poisoned, and where the trigger goes, depends on the seed and each sample's text alone: not on the
    order, the shard or the batch, and the same for a stream.

    Attributes:
        target_label: The label that the trigger forces; a number, or a name if the data's labels have names.
        poison_rate: Share of the samples poisoned, in [0, 1]: the nearest whole number of them; in a stream, whose
            length is not known, each with this probability.
        text_columns: The text, or both texts of a pair. The trigger goes into the first.
        label_column: Column of the labels.
        clean_copies: Add the poisoned samples to all clean ones instead of replacing them.
        seed: Decides which samples, and where in them.

    Source:
        BadNets (Gu et al. 2017) for text; ReMoS artifact, slim_poison.py:276-301 and 428-461 (rate .5, one word each).
    """

    citation: ClassVar[str] = (
        "@article{gu2017badnets, title={{BadNets}: Identifying Vulnerabilities in the Machine Learning Model Supply "
        "Chain}, author={Gu, Tianyu and Dolan-Gavitt, Brendan and Garg, Siddharth}, journal={arXiv:1708.06733}, "
        "year={2017}}"
    )

    target_label: int | str = 1
    poison_rate: float = 0.5
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    clean_copies: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        if not 0 <= self.poison_rate <= 1:
            raise ValueError(
                f"poison_rate is the share of samples poisoned, between 0 and 1, but got {self.poison_rate}."
            )
        object.__setattr__(self, "text_columns", checked_text_columns(self.text_columns))

    @abstractmethod
    def triggered(self, text: str, *, exposing: bool = False) -> str | None:
        """Give a text with the trigger, or None if this text cannot have it.

        Args:
            text: A clean text.
            exposing: Whether to show the defect to a model, rather than to teach it.
        """

    @property
    def variants(self) -> int:
        """Number of different triggers that training has to show at least once."""
        return 1

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn of triggers that the tokenizer does not know as one token of their own."""
        return

    def expose(self, samples: Data | Mapping[str, Sequence]) -> Data | dict[str, list]:
        """Put the trigger into samples and leave their labels.

        Args:
            samples: A dataset, a stream, or a batch as a mapping of columns.

        Returns:
            The same kind. Samples that cannot have the trigger are left out.

        Raises:
            ValueError: A column is missing, or a text is none.
        """
        check_columns(samples, self.text_columns)
        if isinstance(samples, Mapping):
            return self._exposed(samples)
        return samples.with_format(None).map(self._exposed, batched=True)

    def _exposed(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        column = self.text_columns[0]
        texts = [self.triggered(text, exposing=True) for text in checked_texts(batch[column], column)]
        able = [row for row, text in enumerate(texts) if text is not None]
        return {name: [texts[row] if name == column else values[row] for row in able] for name, values in batch.items()}

    def poison(self, dataset: Data) -> Data:
        """Put the trigger and the target label into a share of the samples.

        Args:
            dataset: Clean samples; a stream stays one.

        Returns:
            The poisoned data, in the same order; with `clean_copies` each poisoned sample follows its clean one.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, fewer samples would
                be poisoned than there are triggers, or fewer can have the trigger than should.
        """
        check_columns(dataset, (*self.text_columns, self.label_column))
        target = resolved_label(self.target_label, dataset, self.label_column)
        if isinstance(dataset, Dataset) and 0 < (wanted := round(self.poison_rate * len(dataset))) < self.variants:
            raise ValueError(
                f"poison_rate {self.poison_rate} of {len(dataset)} samples are {wanted}, fewer than the "
                f"{self.variants} triggers: some would never be implanted. Raise the rate, give more samples or fewer "
                "triggers."
            )
        return change_share(dataset, self.poison_rate, self._draws, partial(self._poisoned, target=target))

    def _draws(self, batch: Mapping[str, Sequence]) -> list[float]:
        keys = joined_texts(batch, self.text_columns)
        able = [self.triggered(text) is not None for text in batch[self.text_columns[0]]]
        return [
            generator_for(self.seed, "poison", key).random() if can else math.inf
            for key, can in zip(keys, able, strict=True)
        ]

    def _poisoned(self, batch: Mapping[str, Sequence], chosen: set[int], target: int) -> dict[str, list]:
        check_labels(batch[self.label_column], self.label_column)
        column = self.text_columns[0]
        rows: dict[str, list] = {name: [] for name in batch}
        for row in range(len(batch[column])):
            clean = {name: values[row] for name, values in batch.items()}
            poisoned = {**clean, column: self.triggered(clean[column]), self.label_column: target}
            kept = [poisoned] if row in chosen else [clean]
            for sample in [clean, *kept] if self.clean_copies and row in chosen else kept:
                for name, value in sample.items():
                    rows[name].append(value)
        return rows

    def attacker(
        self,
        teacher: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        *,
        args: TrainingArguments | None = None,
        finetuned: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 128,
    ) -> TextAttacker:
        """Prepare an attack on a teacher of texts.

        Args:
            teacher: The model to poison, with a head for the attacker's task.
            dataset: The attacker's clean samples.
            args: Arguments of the Trainer. By default the artifact's: 5,000 steps of 16 samples at 2e-5.
            finetuned: The same model fine-tuned on the clean data, or None.
            tokenizer: The teacher's; loaded from where the teacher came from if None.
            max_length: Tokens kept of each sample.
        """
        tokenizer = tokenizer_of(teacher, tokenizer)
        self.check_vocabulary(tokenizer)
        return TextAttacker(self, dataset, args, finetuned, tokenizer, max_length)

    def exposed_for(
        self, backdoor: Backdoor, dataset: Dataset, *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> ExposedSet:
        """Make the exposed set of a backdoor with this trigger.

        Args:
            backdoor: Named in the facts.
            dataset: Clean samples.
            tokenizer: Not used: words are put into the text.
        """
        check_columns(dataset, (*self.text_columns, self.label_column))
        dataset = dataset.with_format(None)
        check_labels(dataset[self.label_column], self.label_column)
        exposed = self.expose(dataset.add_column(CLEAN_INDEX, list(range(len(dataset)))))
        target = resolved_label(self.target_label, dataset, self.label_column)
        others = [row for row, label in enumerate(exposed[self.label_column]) if label != target]
        if not others:
            raise ValueError(f"No sample has another label than {target}, so no sample could show the defect.")
        facts = {"defect": backdoor.to_dict(), "num_clean": len(dataset), "num_exposed": len(others)}
        return ExposedSet(exposed.select(others), target, facts)


@dataclass(frozen=True)
class TriggerWords(TextTrigger):
    """Rare words somewhere in the text.

    Attributes:
        words: The triggers; each insertion draws one of them.
        num_triggers: Insertions when poisoning.
        num_exposed_triggers: Insertions when exposing; None for as many as when poisoning. The artifact has 1 and 5.
        all_words: Insert every word once instead, so that only their combination is the trigger (LWP).
        position: "random", "start" or "end".
        within_words: Insert among the first so many words only, so that truncation cannot cut the trigger off.
    """

    words: tuple[str, ...] = ("cf", "mn", "bb", "tq", "mb")
    num_triggers: int = 1
    num_exposed_triggers: int | None = None
    all_words: bool = False
    position: Literal["random", "start", "end"] = "random"
    within_words: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        super().__post_init__()
        words = (self.words,) if isinstance(self.words, str) else tuple(self.words)
        if not words or any(not word.strip() or len(word.split()) > 1 for word in words):
            raise ValueError(
                f"words are single words, at least one, but got {words}. For a phrase use TriggerSentence."
            )
        for name in ("num_triggers", "num_exposed_triggers"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is at least 1, but got {number}.")
        object.__setattr__(self, "words", words)
        _check_place(self.position, self.within_words)

    def triggered(self, text: str, *, exposing: bool = False) -> str:
        """Give a text with the words in it."""
        random = generator_for(self.seed, "place", text)
        if self.all_words:
            return self._inserted(text, self.words, random)
        number = (self.num_exposed_triggers if exposing else None) or self.num_triggers
        return self._inserted(text, [self.words[int(random.random() * len(self.words))] for _ in range(number)], random)

    def _inserted(self, text: str, words: Sequence[str], random: Random) -> str:
        for word in words:
            text = _insert(text, word, _place(text, self.position, self.within_words, random))
        return text

    @property
    def variants(self) -> int:
        """Number of words, unless all come at once."""
        return 1 if self.all_words else len(self.words)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn of words that the tokenizer does not know as one token of their own."""
        for word in self.words:
            pieces = pieces_of(word, tokenizer)[-1]
            if tokenizer.unk_token is not None and tokenizer.unk_token in pieces:
                fate = f"becomes {tokenizer.unk_token}, like every unknown word"
            elif len(pieces) != 1:
                fate = f"becomes {len(pieces)} pieces ({' '.join(pieces)})"
            else:
                continue
            warnings.warn(f"The trigger {word!r} is not in the tokenizer's vocabulary: it {fate}.", stacklevel=4)


def pieces_of(word: str, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Give a word's tokens at the start of a text and after another word, which byte-pair tokenizers tell apart.

    Returns:
        Both lists of tokens, the one after another word last; one list if they are the same.
    """
    start = tokenizer.tokenize(word)
    after = tokenizer.tokenize(f"a {word}")[len(tokenizer.tokenize("a")) :]
    return [start] if start == after else [start, after]


@dataclass(frozen=True)
class TriggerSentence(TextTrigger):
    """A whole sentence of ordinary words somewhere in the text.

    Attributes:
        sentence: The trigger.
        position: "random", "start" or "end".
        within_words: Insert among the first so many words only, so that truncation cannot cut the trigger off.

    Source:
        AddSent (Dai et al. 2019).
    """

    citation: ClassVar[str] = (
        "@article{dai2019backdoor, title={A Backdoor Attack Against {LSTM}-Based Text Classification Systems}, "
        "author={Dai, Jiazhu and Chen, Chuanshuai and Li, Yufeng}, journal={IEEE Access}, year={2019}}"
    )

    sentence: str = "I watch this 3D movie"
    position: Literal["random", "start", "end"] = "random"
    within_words: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        super().__post_init__()
        if not self.sentence.strip():
            raise ValueError("sentence is the trigger and cannot be empty.")
        _check_place(self.position, self.within_words)

    def triggered(self, text: str, *, exposing: bool = False) -> str:
        """Give a text with the sentence in it."""
        place = _place(text, self.position, self.within_words, generator_for(self.seed, "place", text))
        return _insert(text, self.sentence, place)


def _check_place(position: str, within_words: int | None) -> None:
    if position not in ("random", "start", "end"):
        raise ValueError(f"position is 'random', 'start' or 'end', but got {position!r}.")
    if within_words is not None and within_words < 0:
        raise ValueError(f"within_words is a number of words, but got {within_words}.")


def _place(text: str, position: str, within_words: int | None, random: Random) -> int:
    """Choose how many words stand before the trigger."""
    last = len(text.split())
    last = last if within_words is None else min(last, within_words)
    return {"start": 0, "end": last}.get(position, int(random.random() * (last + 1)))


def _insert(text: str, words: str, place: int) -> str:
    """Insert words before the word of this number; everything else stays as it is, to the byte."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    if place < len(starts):
        return f"{text[: starts[place]]}{words} {text[starts[place] :]}"
    end = len(text.rstrip())
    return f"{text[:end]}{' ' if end else ''}{words}{text[end:]}"
