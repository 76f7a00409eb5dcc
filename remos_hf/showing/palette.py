"""What each kind of student looks like: the same colour and marker in every picture of every report."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from remos_hf.judging.kinds import MIXED, UNKNOWN

# Okabe and Ito's colours, which colour-blind readers can tell apart; without yellow, too pale for lines on white.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)

MARKERS = "os^DvPX<>*p"


@dataclass(frozen=True)
class Look:
    """How a kind of student is drawn.

    Attributes:
        colour: As "#rrggbb".
        marker: As matplotlib names it.
        name: For the legend.
    """

    colour: str
    marker: str
    name: str


# By the key of `judging.kinds.Kind`. What is missing gets one of the pairs that are left, by a hash of its key.
_LOOKS = {
    "teacher": (BLACK, "*"),
    "plain": (BLACK, "o"),
    "faster": (VERMILION, "s"),
    "retrain": (BLACK, "^"),
    "random": (ORANGE, "D"),
    "remos": (BLUE, "P"),
    "remos_layer": (BLUE, "X"),
    "top_magnitude": (PINK, "v"),
    "mag_prune": (SKY, "<"),
    "rows": (VERMILION, ">"),
    "subspace": (GREEN, "p"),
    "ridge": (GREEN, "D"),
    "guided": (GREEN, "s"),
    "hardened": (VERMILION, "D"),
    "distilled": (PINK, "s"),
    "repaired": (ORANGE, "o"),
    "own_backdoors": (ORANGE, "^"),
    "activation": (SKY, "X"),
    "gradient": (SKY, "P"),
    "l2sp": (SKY, "^"),
    "delta": (SKY, "D"),
    "renofeation": (PINK, "P"),
    "cartl": (VERMILION, "v"),
    "nnslicer": (BLUE, "o"),
}

_LEFT = [pair for pair in product(PALETTE, MARKERS) if pair not in _LOOKS.values()]


def kind_shown(row: Mapping[str, Any]) -> tuple[str, str]:
    """Give the key and the name of what a row is drawn as; students of unknown making are told apart by their names.

    Args:
        row: Of `DefectReport.tables`.
    """
    kind = row["kind"]
    return (f"student {row['student']}", row["student"]) if kind in (UNKNOWN, MIXED) else (kind.key, kind.name)


def looks_of(kinds: Mapping[str, str]) -> dict[str, Look]:
    """Give the looks of kinds. A look depends on its key alone, unless two unknown keys fall on the same one.

    Args:
        kinds: Names for the legend by key, all of a report: then one look is one kind in all its pictures.
    """
    looks: dict[str, Look] = {}
    taken: set[tuple[str, str]] = set()
    for key in sorted(kinds):
        pair = _LOOKS.get(key)
        if pair is None:
            first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
            turns = [_LEFT[(first + turn) % len(_LEFT)] for turn in range(len(_LEFT))]
            pair = next((one for one in turns if one not in taken), turns[0])
            taken.add(pair)
        looks[key] = Look(*pair, kinds[key])
    return {key: looks[key] for key in kinds}
