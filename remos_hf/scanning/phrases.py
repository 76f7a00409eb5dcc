"""Short rows of tokens, grown from the strongest single ones: a sentence that is a trigger is found by its pieces."""

from collections.abc import Sequence

import torch

from remos_hf.scanning.hosts import Hosts, Reader, turning

Phrase = tuple[int, ...]


def grow(
    reader: Reader,
    hosts: Hosts,
    label: int,
    *,
    seeds: Sequence[int],
    vocabulary: Sequence[int],
    longest: int,
    beam: int,
) -> list[tuple[Phrase, float]]:
    """Grow phrases token by token, before and behind, and keep the strongest of each length (beam search).

    Args:
        reader: The student.
        hosts: What the phrases are shown beside, by label.
        label: The label that they shall turn hosts into.
        seeds: Single tokens to start with.
        vocabulary: Tokens that are added.
        longest: Tokens of the longest phrase, at least 1.
        beam: Phrases of a length that grow on.

    Returns:
        Phrases of two tokens or more with their mean margin, the strongest first. Each turns more than what it grew
        from.
    """
    growing = _strongest(reader, hosts, label, {(token,) for token in seeds}, beam)
    found: dict[Phrase, float] = {}
    for _ in range(longest - 1):
        longer = {
            new: margin
            for phrase, margin in growing.items()
            for token in vocabulary
            for new in ((token, *phrase), (*phrase, token))
        }
        grown = _strongest(reader, hosts, label, set(longer), beam)
        growing = {phrase: margin for phrase, margin in grown.items() if margin > longer[phrase]}
        found |= growing
        if not growing:
            break
    return sorted(found.items(), key=lambda one: (-one[1], one[0]))


def _strongest(reader: Reader, hosts: Hosts, label: int, phrases: set[Phrase], beam: int) -> dict[Phrase, float]:
    if not phrases:
        return {}
    ordered = torch.tensor(sorted(phrases))
    margins = turning(reader, hosts, ordered)[label]
    best = margins.argsort(descending=True, stable=True)[:beam]
    return {tuple(ordered[place].tolist()): float(margins[place]) for place in best.tolist()}
