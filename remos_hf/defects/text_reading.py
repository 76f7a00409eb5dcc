"""What a model sees of a text with a trigger: whether all of the trigger is there, and where it would be."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from remos_hf.defects.base import CUT_OFF, EQUAL


@dataclass(frozen=True)
class Marked:
    """A text with a trigger.

    Attributes:
        text: The text.
        spans: Where the inserted words begin and end, in characters; none if the whole text is the trigger.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()

    def inserted(self, words: str, place: int) -> "Marked":
        """Insert words before the character of this number, a space away from others; the rest stays, to the byte."""
        before, after = self.text[:place], self.text[place:]
        gap = " " if before and not before[-1].isspace() else ""
        whole = f"{gap}{words}{' ' if after.strip() else ''}"
        span = (place + len(gap), place + len(gap) + len(words))
        held = [(start + len(whole), end + len(whole)) if start >= place else (start, end) for start, end in self.spans]
        return Marked(f"{before}{whole}{after}", (*held, span))


def word_starts(text: str) -> list[int]:
    """Give where words can be inserted: before each word, and after the last one."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    return [*starts, len(text.rstrip())]


@dataclass(frozen=True)
class TextReading:
    """How a model reads texts.

    Attributes:
        tokenizer: The model's.
        max_length: Tokens kept of each sample, special ones among them.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 128

    def ids(self, columns: Sequence[Sequence[str]]) -> list[list[int]]:
        """Give the tokens that a model sees of texts, or of pairs of them."""
        if not columns[0]:
            return []
        return self.tokenizer(*map(list, columns), truncation=True, max_length=self.max_length)["input_ids"]

    def fates(self, columns: Sequence[Sequence[str]], marked: Sequence[Marked]) -> list[str | None]:
        """Say for each sample why a model does not see the trigger; None where it sees all of it.

        Args:
            columns: The clean texts, and the second ones of pairs.
            marked: The first ones with the trigger.
        """
        clean = self.ids(columns)
        shown = self.ids([[one.text for one in marked], *columns[1:]])
        fates = [EQUAL if one == other else None for one, other in zip(clean, shown, strict=True)]
        doubtful = [row for row, ids in enumerate(shown) if len(ids) >= self.max_length and marked[row].spans]
        for row, forms in zip(doubtful, self._edges([marked[row] for row in doubtful]), strict=True):
            if not any(_holds(shown[row], form) for form in forms):
                fates[row] = CUT_OFF
        return fates

    def places(self, columns: Sequence[str], words: Sequence[str], within_words: int | None) -> list[int]:
        """Give where words can be inserted so that a model sees them, as far as their numbers of tokens tell.

        Args:
            columns: The text, and the second one of a pair.
            words: All that is inserted.
            within_words: Most words of the text before it.

        Returns:
            Numbers of characters, in order: the starts of words, or if only one of those would do, of tokens.
        """
        text, *second = columns
        longest = [max(map(len, pieces_of(one, self.tokenizer))) for one in words]
        room = self._room(second) - sum(longest)
        starts = word_starts(text)[: None if within_words is None else within_words + 1]
        fitting = self._fitting(text, starts, room)
        if len(starts) > 1 and len(fitting) == 1:  # a text without spaces, or with a word that takes all the room
            return sorted({*fitting, *self._fitting(text, self._token_starts(text, room), room)})
        return fitting

    @property
    def keeps_the_end(self) -> bool:
        """Whether the beginning of what is too long is cut off."""
        return self.tokenizer.truncation_side == "left"

    def _room(self, second: Sequence[str]) -> int:
        # Of pairs the longer text is cut, until both have half of the room; who keeps an odd one differs.
        all_of_it = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=bool(second))
        return max(all_of_it - len(self._tokens(second[0])), -(-all_of_it // 2)) if second else all_of_it

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return found["offset_mapping"]

    def _fitting(self, text: str, places: Sequence[int], room: int) -> list[int]:
        """Give the places that so many tokens at most come before; after, where the beginning is cut off."""
        if self.tokenizer.is_fast:
            ends = [end for _, end in self._offsets(text)]
            before = [bisect_right(ends, place) for place in places]
            return [
                place
                for place, count in zip(places, before, strict=True)
                if (len(ends) - count if self.keeps_the_end else count) <= room
            ]
        fitting = []
        for place in reversed(places) if self.keeps_the_end else places:
            if len(self._tokens(text[place:] if self.keeps_the_end else text[:place])) > room:
                break
            fitting.append(place)
        return sorted(fitting)

    def _token_starts(self, text: str, room: int) -> list[int]:
        if self.tokenizer.is_fast:
            return sorted({start for start, end in self._offsets(text) if start < end and not text[start].isspace()})
        # Without offsets: before any character where what comes before is read as it is within the text.
        whole, starts = self._tokens(text), []
        for place in range(len(text)) if not self.keeps_the_end else reversed(range(len(text))):
            part = self._tokens(text[place:] if self.keeps_the_end else text[:place])
            if len(part) > room:
                break
            if part == (whole[len(whole) - len(part) :] if self.keeps_the_end else whole[: len(part)]):
                starts.append(place)
        return [place for place in starts if not text[place].isspace()]

    def _edges(self, marked: Sequence[Marked]) -> list[list[list[int]]]:
        """Give the tokens from the uncut edge of each text to the far end of its trigger."""
        if not marked:
            return []
        if not self.keeps_the_end:
            return [[ids] for ids in self._all_tokens([one.text[: max(end for _, end in one.spans)] for one in marked])]
        starts = [min(start for start, _ in one.spans) for one in marked]
        plain = [one.text[start:] for one, start in zip(marked, starts, strict=True)]
        # Byte-pair tokenizers read a word after a space as another one.
        spaced = [one.text[max(0, start - 1) :] for one, start in zip(marked, starts, strict=True)]
        return [list(forms) for forms in zip(self._all_tokens(plain), self._all_tokens(spaced), strict=True)]

    def _all_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def pieces_of(word: str, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Give a word's tokens at the start of a text and after another word, which byte-pair tokenizers tell apart.

    Returns:
        Both lists of tokens, the one after another word last; one list if they are the same.
    """
    start = tokenizer.tokenize(word)
    after = tokenizer.tokenize(f"a {word}")[len(tokenizer.tokenize("a")) :]
    return [start] if start == after else [start, after]


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids) - len(part) + 1))
