import importlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from remos_hf.showing import canvas
from tests.showing.test_pictures import pair, share_figure


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


def test_a_drawing_is_written_in_few_colours_and_a_photograph_in_all(tmp_path):
    figure = share_figure(pair()[1])
    drawn, photograph = (
        Image.open(canvas.written(tmp_path / f"{kind}.png", figure, photographs=kind)) for kind in (False, True)
    )
    assert drawn.size == photograph.size == (1280, round(figure.get_figheight() * 200))
    assert (drawn.mode, photograph.mode) == ("P", "RGB")
    assert (tmp_path / "False.png").stat().st_size < (tmp_path / "True.png").stat().st_size / 2
    (bars,) = {bar.get_facecolor() for bar in figure.axes[0].patches}
    exact = tuple(round(255 * part) for part in bars[:3])
    assert {exact, (255, 255, 255)} <= {colour for _, colour in drawn.convert("RGB").getcolors()}
