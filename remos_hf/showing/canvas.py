"""An empty picture: its size, style and letters, and how it is written."""

import io
import os
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from remos_hf.showing.palette import PALETTE
from remos_hf.whole import replace_file

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.ticker import FuncFormatter
except ImportError as error:
    raise ImportError("Pictures need matplotlib: pip install 'remos_hf[plots]'.") from error


GREY = "#8C8C8C"


_BLENDS = (1, 0.75, 0.5, 0.25)  # of a colour with white: edges of lines, and areas


WIDTH = 6.4  # inches, which make 1280 pixels


_DPI = 200


_ROW = 0.2  # inches for one layer of a picture with a row a layer


_LETTERS = 26  # of a layer's name


_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "grid.color": "0.9",
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.bbox": None,
    "savefig.facecolor": "white",
    "text.usetex": False,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}


PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}")


# Whatever style the caller has set: the same numbers make the same file.
styled = context(_STYLE, after_reset=True)


def new_figure(title: str, height: float) -> Figure:
    """Make a figure of the one width, with its title."""
    figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 52), x=0.01, ha="left")
    return figure


def layers_figure(title: str, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Make a figure with a row a layer."""
    figure = new_figure(title, max(2.2, _ROW * len(names) + 1.7))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), short_names(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    # Rows far from the bottom want an axis near them.
    axes.tick_params(axis="x", top=len(names) > 20, labeltop=len(names) > 20)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


@styled
def written(path: str | os.PathLike, figure: Figure, *, photographs: bool = False) -> Path:
    """Write a figure as PNG: the same figure gives the same file.

    Args:
        path: The file.
        figure: The figure.
        photographs: Whether it holds some. A drawing is written in the colours of our palette and their blends with
            white, which makes it a third as large.
    """
    # Drawn once: `savefig` draws first to lay out and then again.
    figure.set_dpi(_DPI)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    if not photographs:
        picture = picture.quantize(palette=_drawing_colours(), dither=Image.Dither.NONE)
    content = io.BytesIO()
    picture.save(content, format="png")
    path = Path(path)
    replace_file(path, content.getvalue())
    return path


@cache
def _drawing_colours() -> Image.Image:
    whole = [tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in PALETTE]
    blends = [tuple(round(255 - part * (255 - one)) for one in colour) for colour in whole for part in _BLENDS]
    greys = [(level,) * 3 for level in range(0, 256, 15)]
    colours = list(dict.fromkeys([*blends, *greys]))
    picture = Image.new("P", (1, 1))
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def short_names(names: Sequence[str]) -> list[str]:
    """Leave out what all names have in common, and what comes first in long ones, as long as names stay apart."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    common = len(os.path.commonprefix([one[:-1] for one in parts]))
    whole = [".".join(one[common:]) for one in parts]
    short = []
    for name in whole:
        held = name.split(".")
        while len(held) > 1 and len(".".join(held)) > _LETTERS:
            held = held[1:]
        short.append(".".join(held)[-_LETTERS:])
    return short if len(set(short)) == len(set(whole)) else whole


def short_number(value: float) -> str:
    """Write a number with two digits."""
    return f"{value:.2g}".replace("-", "\N{MINUS SIGN}")
