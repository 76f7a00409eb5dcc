"""Numbers in words: rates, counts, seeds, spans."""

from collections.abc import Mapping, Sequence
from typing import Any

from remos_hf.judging.tables import Choice, percent, tenths


def rate_told(rate: Any) -> str:  # noqa: ANN401 - a rate
    """Write a rate with its interval and its number of samples."""
    # No line ends between a number and what belongs to it.
    told = f"{percent(rate)} % [{tenths(rate.low)}, {tenths(rate.high)}] (n = {rate.num_samples:,})"
    return told.replace(" ", "\N{NO-BREAK SPACE}").replace("]\N{NO-BREAK SPACE}(", "] (")


def choice_name(choice: Choice) -> str:
    """Name a rule with its slice ratio."""
    ratio = choice.row["made"].get("slice_ratio")
    return f"{choice.rule}, slice ratio {ratio:g}" if ratio is not None else choice.rule


def point_told(row: Mapping[str, Any]) -> str:
    """Write a row's accuracy and DIR."""
    return f"accuracy {percent(row['acc'])} %, DIR {percent(row['dir'])} %"


def count_told(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def seeds_told(seeds: set[Any]) -> str:
    """Name seeds."""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(sorted(map(str, seeds)))}"


def span_told(sizes: Sequence[int]) -> str:
    """Write the smallest and the largest of several sizes."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def capitalised(text: str) -> str:
    """Begin a sentence with a text."""
    return text[:1].upper() + text[1:]
