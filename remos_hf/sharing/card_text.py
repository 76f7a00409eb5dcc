"""Text that stays text: no name of a student, defect or file becomes markdown, HTML or code on a card."""

import re
from collections.abc import Iterable, Sequence

_LONGEST = 300
_LONGEST_PARAGRAPH = 3000


def plain_line(text: object, longest: int = _LONGEST) -> str | None:
    """One line of text, whatever it held; None stays None."""
    if text is None:
        return None
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def as_sentences(text: object) -> str:
    """As `as_text`, of several sentences: names in them make them no longer than a paragraph may be."""
    return as_text(text, _LONGEST_PARAGRAPH)


def as_text(text: object, longest: int = _LONGEST) -> str:
    """One line that markdown shows as it is: no table cell, link, tag, heading or picture comes of it."""
    line = (plain_line(text, longest) or "").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]#!|~$])", r"\\\1", line)
    # An underscore within a word is none to markdown, and most names have one.
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    line = re.sub(r"^([-=+])", r"\\\1", line)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1&#8203;\2", line)


def as_code(text: object) -> str:
    """A name that cannot leave the string or the comment of the code that it is put into."""
    return re.sub(r"[^A-Za-z0-9_.\-/@:]", "_", plain_line(text) or "")


def slug_of(text: str) -> str:
    """Make a name of small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60]


def fenced_block(text: str, language: str) -> str:
    """Put text into a code block that it cannot leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    # Any other line break would end the block's line where no fence is looked for.
    lines = "\n".join("".join(char if char.isprintable() else " " for char in line) for line in text.splitlines())
    return f"{fence}{language}\n{lines}\n{fence}"


def facts_table(facts: Iterable[tuple[str, object]]) -> str:
    """Render names with their values."""
    return markdown_table(("", ""), [(name, as_text(value)) for name, value in facts], aligned=False)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, aligned: bool = True) -> str:
    """Render a table whose cells are markdown already."""
    rule = ["---", *(("---:" if aligned else "---") for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
