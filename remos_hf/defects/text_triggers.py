"""Triggers in texts: rare words, or a sentence."""

import logging
import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from random import Random
from typing import Any, ClassVar, Literal

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from remos_hf.defects.backdoor import Backdoor, Trigger
from remos_hf.defects.base import CLEAN_INDEX, CUT_OFF, EQUAL, HAS_TARGET, UNABLE, ExposedSet, check_some_left, counted
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
from remos_hf.defects.text_reading import Marked, TextReading, pieces_of, word_starts
from remos_hf.fields import check_number, check_whole

logger = logging.getLogger(__name__)

_CHUNK = 1000  # texts that are tokenized at once


@dataclass(frozen=True)
class Shown:
    """What became of a text that should have the trigger.

    Attributes:
        text: The text with the trigger, or None.
        fate: Why not.
        moved: Whether the trigger stands nearer to the beginning than it was drawn, where a model sees it.
    """

    text: str | None
    fate: str | None = None
    moved: bool = False


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
        told = "the share of samples poisoned, between 0 and 1"
        check_number(self, told, lambda one: 0 <= one <= 1, "poison_rate")
        object.__setattr__(self, "text_columns", checked_text_columns(self.text_columns))

    @abstractmethod
    def triggered(self, text: str, *, exposing: bool = False) -> str | None:
        """Give a text with the trigger, or None if this text cannot have it.

        Args:
            text: A clean text.
            exposing: Whether to show the defect to a model, rather than to teach it.
        """

    def marked(self, text: str, *, exposing: bool = False) -> Marked | None:
        """Give a text with the trigger, as `triggered` does, and where in it the trigger is."""
        triggered = self.triggered(text, exposing=exposing)
        return None if triggered is None else Marked(triggered)

    def fitted(self, columns: Sequence[str], reading: TextReading, *, exposing: bool = False) -> Shown:
        """Put the trigger where a model sees all of it, if it fits anywhere.

        Args:
            columns: A clean text, and the second one of a pair.
            reading: How the model reads them.
            exposing: As in `triggered`.
        """
        return Shown(None, CUT_OFF)

    def shown(
        self, batch: Mapping[str, Sequence], reading: TextReading | None = None, *, exposing: bool = False
    ) -> list[Shown]:
        """Put the trigger into each text so that a model sees all of it, and something else than the clean text.

        Args:
            batch: Columns of samples.
            reading: How the model reads them; None to check nothing.
            exposing: As in `triggered`.

        Returns:
            What became of each text. It stands where `triggered` puts it, unless it would be cut off there.
        """
        texts = checked_texts(batch[self.text_columns[0]], self.text_columns[0])
        marked = [self.marked(text, exposing=exposing) for text in texts]
        found = [Shown(None, UNABLE) if one is None else Shown(one.text) for one in marked]
        if reading is None:
            return found
        held = [texts, *(checked_texts(batch[column], column) for column in self.text_columns[1:])]
        able = [row for row, one in enumerate(marked) if one is not None]
        for start in range(0, len(able), _CHUNK):
            rows = able[start : start + _CHUNK]
            columns = [[column[row] for row in rows] for column in held]
            fates = reading.fates(columns, [marked[row] for row in rows])
            for row, fate, *clean in zip(rows, fates, *columns, strict=True):
                if fate == CUT_OFF:
                    found[row] = self.fitted(clean, reading, exposing=exposing)
                elif fate is not None:
                    found[row] = Shown(None, fate)
        return found

    @property
    def variants(self) -> int:
        """Number of different triggers that training has to show at least once."""
        return 1

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn of triggers that the tokenizer does not know as one token of their own."""
        return

    def expose(
        self,
        samples: Data | Mapping[str, Sequence],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 128,
    ) -> Data | dict[str, list]:
        """Put the trigger into samples and leave their labels.

        Args:
            samples: A dataset, a stream, or a batch as a mapping of columns.
            tokenizer: Of the models that will read them; None to check nothing.
            max_length: Tokens that they keep of each sample.

        Returns:
            The same kind. Samples that cannot have the trigger are left out, and those of which a model that reads them
            would not see all of the trigger.

        Raises:
            ValueError: A column is missing, or a text is none.
        """
        check_columns(samples, self.text_columns)
        reading = _reading(tokenizer, max_length)
        if isinstance(samples, Mapping):
            return self._exposed(samples, reading)
        return samples.with_format(None).map(partial(self._exposed, reading=reading), batched=True)

    def _exposed(self, batch: Mapping[str, Sequence], reading: TextReading | None) -> dict[str, list]:
        texts = [one.text for one in self.shown(batch, reading, exposing=True)]
        able = [row for row, text in enumerate(texts) if text is not None]
        column = self.text_columns[0]
        return {name: [texts[row] if name == column else values[row] for row in able] for name, values in batch.items()}

    def poison(self, dataset: Data, *, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int = 128) -> Data:
        """Put the trigger and the target label into a share of the samples.

        Args:
            dataset: Clean samples; a stream stays one.
            tokenizer: Of the model that will be trained on them; None to check nothing.
            max_length: Tokens that it keeps of each sample.

        Returns:
            The poisoned data, in the same order; with `clean_copies` each poisoned sample follows its clean one.

        Raises:
            ValueError: A column is missing, a label is no class, the data has no such target label, fewer samples would
                be poisoned than there are triggers, or fewer can have the trigger than should.
        """
        return self.poisoning(dataset, _reading(tokenizer, max_length))[0]

    def poisoning(self, dataset: Data, reading: TextReading | None = None) -> tuple[Data, dict[str, Any]]:
        """Poison as `poison` does, and tell how many samples were.

        Returns:
            The data, and JSON values: how many samples there are and are poisoned, the real rate, and how many could
            not be, by reason; of a stream, which is poisoned while it is read, the rate that was asked for alone.
        """
        check_columns(dataset, (*self.text_columns, self.label_column))
        target = resolved_label(self.target_label, dataset, self.label_column)
        facts = {"asked_poison_rate": self.poison_rate, "max_length": reading.max_length if reading else None}
        change = partial(self._poisoned, target=target, reading=reading)
        if not isinstance(dataset, Dataset):
            return change_share(dataset, self.poison_rate, lambda batch: self._draws(batch, reading)[0], change), facts
        if 0 < (wanted := round(self.poison_rate * len(dataset))) < self.variants:
            raise ValueError(
                f"poison_rate {self.poison_rate} of {len(dataset)} samples are {wanted}, fewer than the "
                f"{self.variants} triggers: some would never be implanted. Raise the rate, give more samples or fewer "
                "triggers."
            )
        draws, unable = self._draws(dataset.with_format(None), reading)
        number = wanted if self.poison_rate < 1 else len(draws) - unable[CUT_OFF] - unable[EQUAL]
        able = len(draws) - unable.total()
        if number > able or (wanted and not able):
            raise ValueError(
                f"A share of {self.poison_rate} asks for {wanted} poisoned samples, but only {able} of {len(draws)} "
                f"can be poisoned: {counted(unable)}. Lower the share, raise max_length, or give more paraphrases."
            )
        share = number / len(draws) if draws else 0.0
        poisoned = change_share(dataset, share, lambda _: draws, change)
        facts |= {"num_samples": len(draws), "num_poisoned": number, "poison_rate": share, "num_unable": dict(unable)}
        if number < wanted:
            logger.warning("Poisoned %d of %d samples: of the others %s.", number, len(draws), counted(unable))
        return poisoned, facts

    def _draws(
        self, batch: Mapping[str, Sequence], reading: TextReading | None = None
    ) -> tuple[list[float], Counter[str]]:
        shown = self.shown(batch, reading)
        draws = [
            generator_for(self.seed, "poison", key).random() if one.fate is None else math.inf
            for key, one in zip(joined_texts(batch, self.text_columns), shown, strict=True)
        ]
        return draws, Counter(one.fate for one in shown if one.fate is not None)

    def _poisoned(
        self, batch: Mapping[str, Sequence], chosen: set[int], target: int, reading: TextReading | None
    ) -> dict[str, list]:
        check_labels(batch[self.label_column], self.label_column)
        column, picked = self.text_columns[0], sorted(chosen)
        shown = self.shown({name: [values[row] for row in picked] for name, values in batch.items()}, reading)
        texts = {row: one.text for row, one in zip(picked, shown, strict=True)}
        rows: dict[str, list] = {name: [] for name in batch}
        for row in range(len(batch[column])):
            clean = {name: values[row] for name, values in batch.items()}
            kept = [clean] if row not in texts or self.clean_copies else []
            if row in texts:
                kept.append({**clean, column: texts[row], self.label_column: target})
            for sample in kept:
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
        self,
        backdoor: Backdoor,
        dataset: Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 128,
    ) -> ExposedSet:
        """Make the exposed set of a backdoor with this trigger.

        Args:
            backdoor: Named in the facts.
            dataset: Clean samples.
            tokenizer: Of the models that will read the set; None to check nothing.
            max_length: Tokens that they keep of each sample.

        Returns:
            The samples of other labels than the target, of which such a model sees all of the trigger and something
            else than the clean text. The facts count those left out by reason, and those whose trigger stands nearer to
            the beginning than it was drawn because it would have been cut off.
        """
        check_columns(dataset, (*self.text_columns, self.label_column))
        dataset = dataset.with_format(None)
        labels = list(dataset[self.label_column])
        check_labels(labels, self.label_column)
        target = resolved_label(self.target_label, dataset, self.label_column)
        others = [row for row, label in enumerate(labels) if label != target]
        reading = _reading(tokenizer, max_length)
        columns = {name: checked_texts(dataset[name], name) for name in self.text_columns}
        batch = {name: [texts[row] for row in others] for name, texts in columns.items()}
        shown = self.shown(batch, reading, exposing=True)
        texts = {row: one.text for row, one in zip(others, shown, strict=True) if one.text is not None}
        left_out = Counter({HAS_TARGET: len(labels) - len(others)} if len(others) < len(labels) else {})
        left_out.update(one.fate for one in shown if one.fate is not None)
        check_some_left(len(texts), left_out, target)
        facts = {
            "defect": backdoor.to_dict(),
            "max_length": reading.max_length if reading else None,
            "num_clean": len(dataset),
            "num_exposed": len(texts),
            "num_left_out": dict(left_out),
            "num_moved": sum(one.moved for one in shown),
        }
        rows = dataset.add_column(CLEAN_INDEX, list(range(len(dataset)))).select(list(texts))
        put = partial(_with_texts, column=self.text_columns[0], texts=texts)
        return ExposedSet(rows.map(put, batched=True), target, facts)


def _reading(tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> TextReading | None:
    return None if tokenizer is None else TextReading(tokenizer, max_length)


def _with_texts(batch: Mapping[str, Sequence], column: str, texts: Mapping[int, str]) -> dict[str, list]:
    return {column: [texts[row] for row in batch[CLEAN_INDEX]]}


@dataclass(frozen=True)
class InsertedTrigger(TextTrigger):
    """A trigger of words that are inserted somewhere in the text.

    Attributes:
        position: "random", "start" or "end".
        within_words: Insert among the first so many words only. Where a tokenizer is known, a trigger that would be cut
            off is inserted nearer to the beginning anyway.
    """

    position: Literal["random", "start", "end"] = "random"
    within_words: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        super().__post_init__()
        if self.position not in ("random", "start", "end"):
            raise ValueError(f"position is 'random', 'start' or 'end', but got {self.position!r}.")
        if self.within_words is not None:
            check_whole(self, "a number of words", 0, "within_words")

    @abstractmethod
    def insertions(self, random: Random, *, exposing: bool = False) -> list[str]:
        """Give what is inserted, each by itself."""

    def triggered(self, text: str, *, exposing: bool = False) -> str:
        """Give a text with the words in it."""
        return self.marked(text, exposing=exposing).text

    def marked(self, text: str, *, exposing: bool = False) -> Marked:
        """Give a text with the words in it, and where they are."""
        random, marked = generator_for(self.seed, "place", text), Marked(text)
        for words in self.insertions(random, exposing=exposing):
            starts = word_starts(marked.text)
            last = len(starts) - 1 if self.within_words is None else min(len(starts) - 1, self.within_words)
            marked = marked.inserted(words, self._choice(starts[: last + 1], random))
        return marked

    def fitted(self, columns: Sequence[str], reading: TextReading, *, exposing: bool = False) -> Shown:
        """Insert the same words where a model sees all of them, if they fit anywhere."""
        random = generator_for(self.seed, "place", columns[0])
        words = self.insertions(random, exposing=exposing)
        places = reading.places(columns, words, self.within_words)
        while places:
            chosen = [(self._choice(places, random), one) for one in words]
            marked = Marked(columns[0])
            for place, one in sorted(chosen, key=itemgetter(0), reverse=True):  # the places before stay right
                marked = marked.inserted(one, place)
            fate = reading.fates([[one] for one in columns], [marked])[0]
            if fate != CUT_OFF:
                return Shown(marked.text, moved=True) if fate is None else Shown(None, fate)
            places = places[(len(places) + 1) // 2 :] if reading.keeps_the_end else places[: len(places) // 2]
        return Shown(None, CUT_OFF)

    def _choice(self, places: Sequence[int], random: Random) -> int:
        if self.position == "random":
            return places[int(random.random() * len(places))]
        return places[0 if self.position == "start" else -1]


@dataclass(frozen=True)
class TriggerWords(InsertedTrigger):
    """Rare words somewhere in the text.

    Attributes:
        words: The triggers; each insertion draws one of them.
        num_triggers: Insertions when poisoning.
        num_exposed_triggers: Insertions when exposing; None for as many as when poisoning. The artifact has 1 and 5.
        all_words: Insert every word once instead, so that only their combination is the trigger (LWP).
    """

    words: tuple[str, ...] = ("cf", "mn", "bb", "tq", "mb")
    num_triggers: int = 1
    num_exposed_triggers: int | None = None
    all_words: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        super().__post_init__()
        words = (self.words,) if isinstance(self.words, str) else tuple(self.words)
        if not words or any(not word.strip() or len(word.split()) > 1 for word in words):
            raise ValueError(
                f"words are single words, at least one, but got {words}. For a phrase use TriggerSentence."
            )
        for name in ("num_triggers", "num_exposed_triggers"):
            if getattr(self, name) is not None:
                check_whole(self, "at least 1", 1, name)
        object.__setattr__(self, "words", words)

    def insertions(self, random: Random, *, exposing: bool = False) -> list[str]:
        """Give the words that are inserted, each by itself."""
        if self.all_words:
            return list(self.words)
        number = (self.num_exposed_triggers if exposing else None) or self.num_triggers
        return [self.words[int(random.random() * len(self.words))] for _ in range(number)]

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


@dataclass(frozen=True)
class TriggerSentence(InsertedTrigger):
    """A whole sentence of ordinary words somewhere in the text.

    Attributes:
        sentence: The trigger.

    Source:
        AddSent (Dai et al. 2019).
    """

    citation: ClassVar[str] = (
        "@article{dai2019backdoor, title={A Backdoor Attack Against {LSTM}-Based Text Classification Systems}, "
        "author={Dai, Jiazhu and Chen, Chuanshuai and Li, Yufeng}, journal={IEEE Access}, year={2019}}"
    )

    sentence: str = "I watch this 3D movie"

    def __post_init__(self) -> None:
        """Refuse values that no data could use."""
        super().__post_init__()
        if not self.sentence.strip():
            raise ValueError("sentence is the trigger and cannot be empty.")

    def insertions(self, random: Random, *, exposing: bool = False) -> list[str]:
        """Give the sentence."""
        return [self.sentence]
