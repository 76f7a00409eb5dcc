"""Terms are explained once, where a page first uses them."""

import re
from collections.abc import Iterable, Mapping

# As tables shorten them.
_ALSO = {"benign floor": ("floor",), "dev accuracy": ("dev ACC",)}


class FirstUses:
    """Which terms a page has not used yet."""

    def __init__(self, terms: Mapping[str, str]) -> None:
        self._left = dict(terms)

    def among(self, texts: Iterable[str]) -> list[tuple[str, str]]:
        """Give the terms that texts use first, with what they mean; each is given once.

        Args:
            texts: In the order of the page.
        """
        text = "\n".join(texts)
        used = [term for term in self._left if any(_uses(text, one) for one in (term, *_ALSO.get(term, ())))]
        return [(term, self._left.pop(term)) for term in used]


def _uses(text: str, term: str) -> bool:
    # An abbreviation in capitals is no common word.
    flags = 0 if term.isupper() else re.IGNORECASE
    return re.search(rf"(?<![\w-]){re.escape(term)}s?(?![\w-])", text, flags) is not None
