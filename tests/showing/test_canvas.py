import importlib
import io
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors
from PIL import Image

from remos_hf.showing import canvas, pictures
from tests.showing.test_pictures import pair, share_figure


def test_the_palette_is_okabe_and_itos_and_each_color_reads_on_white():
    okabe_ito = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    assert set(pictures.PALETTE) < set(okabe_ito) and len(set(pictures.PALETTE)) == 7
    for color in pictures.PALETTE:
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
        assert 1.05 / (np.dot(light, (0.2126, 0.7152, 0.0722)) + 0.05) > 2


def test_colors_and_markers_together_do_not_repeat_soon():
    looks = list(canvas.looks_of_kinds())
    assert len(set(looks)) == len(looks) == 77


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "remos_hf.showing.pictures")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"remos_hf\[plots\]"):
        importlib.import_module("remos_hf.showing.pictures")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["bert.encoder.layer.0.query.weight", "bert.encoder.layer.1.query.weight"], ["0.query", "1.query"]),
        (["layer1.conv.weight", "layer2.conv.weight"], ["layer1.conv", "layer2.conv"]),
        (["conv.weight"], ["conv"]),
        (["weight"], ["weight"]),
        (["a.b.weight", "a.weight"], ["a.b", "a"]),
        (["encoder.layer.0.attention.query", "head.projection"], ["layer.0.attention.query", "head.projection"]),
        (
            [f"a.{n}.aVeryLongComponent.attention.key" for n in "01"],
            [f"{n}.aVeryLongComponent.attention.key" for n in "01"],
        ),
    ],
)
def test_names_leave_out_what_they_share_and_what_comes_first(names, short):
    assert canvas.short_names(names) == short


@given(st.lists(st.lists(st.sampled_from("abc0123456789"), min_size=1, max_size=20), min_size=1, max_size=8))
def test_short_names_stay_apart(parts):
    names = list(dict.fromkeys(".".join(one) + ".weight" for one in parts))
    found = canvas.short_names(names)
    assert len(set(found)) == len(names) and all(found)


def test_the_bytes_of_a_figure_are_what_is_written(tmp_path):
    figure = share_figure(pair()[1])
    content = io.BytesIO(canvas.written(tmp_path / "picture.png", figure).read_bytes())
    assert Image.open(content).size == (1280, round(figure.get_figheight() * 200))
