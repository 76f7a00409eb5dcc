"""Pictures of detection: how many attacked inputs are caught at how many false alarms."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from remos_hf.errors import NonFiniteError
from remos_hf.judging.words import span_told
from remos_hf.showing.canvas import GREY, PERCENT, new_figure, styled, written
from remos_hf.showing.palette import PALETTE

try:
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve
except ImportError as error:
    raise ImportError(
        "Pictures of detection need matplotlib and scikit-learn: pip install 'remos_hf[examples]'."
    ) from error

_DASHES = ("-", "--", ":", "-.")
_POINTS = np.linspace(0, 1, 201)

# Scores of clean and of attacked inputs, from 0 to 1.
Scores = tuple[Sequence[float], Sequence[float]]


def detection_curves(panels: Mapping[str, Mapping[str, Sequence[Scores]]], path: str | os.PathLike) -> Path:
    """Draw ROC curves: the share of attacked inputs that is flagged against the share of clean inputs that is.

    Args:
        panels: By title, and there by what each detector looks at: the scores of each seed, or split. Curves are means
            of their recall at equal shares of false alarms.
        path: The PNG file.

    Returns:
        The file written.

    Raises:
        ValueError: There is nothing to draw, or a seed without clean or without attacked inputs.
        NonFiniteError: A score is NaN or infinite.
    """
    return written(path, detection_figure(panels))


@styled
def detection_figure(panels: Mapping[str, Mapping[str, Sequence[Scores]]]) -> Figure:
    """Make the figure of `detection_curves`."""
    if not panels or not all(panels.values()):
        raise ValueError("There is no detector to draw.")
    names = list(dict.fromkeys(name for detectors in panels.values() for name in detectors))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(
        "Attacked inputs caught against false alarms", rows * (3.5 if columns == 2 else 5.2) + 0.26 * len(names) + 1
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for number, (axes, (title, detectors)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        for name, seeds in detectors.items():
            place = names.index(name)
            look = {"color": PALETTE[place % len(PALETTE)], "linestyle": _DASHES[place // len(PALETTE) % len(_DASHES)]}
            axes.plot([0, *_POINTS], [0, *_mean_curve(seeds)], **look)
        counted = {tuple(map(len, one)) for seeds in detectors.values() for one in seeds}
        clean, attacked = (span_told([one[side] for one in counted]) for side in (0, 1))
        axes.set_title(f"{title}\nn = {attacked} attacked,\n{clean} clean")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PERCENT)
        axes.set_aspect("equal")
        if number % columns == 0:
            axes.set_ylabel("attacked inputs caught (%)")
        if number + columns >= len(panels):
            axes.set_xlabel("false alarms (%)")
            axes.tick_params(labelbottom=True)
    for place, name in enumerate(names):
        look = {"color": PALETTE[place % len(PALETTE)], "linestyle": _DASHES[place // len(PALETTE) % len(_DASHES)]}
        grid[0].plot([], [], label=name, **look)
    figure.legend(loc="outside lower left", ncols=1)
    return figure


def _mean_curve(seeds: Sequence[Scores]) -> np.ndarray:
    curves = []
    for clean, attacked in seeds:
        scores = np.concatenate([np.asarray(clean, float), np.asarray(attacked, float)])
        if not len(clean) or not len(attacked):
            raise ValueError(f"A curve wants clean and attacked inputs, but got {len(clean)} and {len(attacked)}.")
        if not np.isfinite(scores).all():
            raise NonFiniteError("A score is NaN or infinite. Scores are those of InputDetector.scores.")
        alarms, caught, _ = roc_curve(np.arange(len(scores)) >= len(clean), scores)
        curves.append(np.interp(_POINTS, alarms, caught))
    return np.mean(curves, 0)
