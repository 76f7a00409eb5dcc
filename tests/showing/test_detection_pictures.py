from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from remos_hf.errors import NonFiniteError
from remos_hf.showing.detection_pictures import detection_curves, detection_figure
from tests.showing.test_pictures import words

GOOD, BAD = ([0.0, 0.1, 0.2, 0.7], [0.9, 1.0, 0.6]), ([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
PANELS = {"adversarial": {"slice": [GOOD, BAD], "logits": [BAD]}, "trigger": {"slice": [GOOD]}}


def curves(figure):
    return {
        axes.get_title(loc="left").partition("\n")[0]: [
            line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 2
        ]
        for axes in figure.axes
        if axes.get_title(loc="left")
    }


def test_a_curve_is_the_mean_over_seeds_of_what_is_caught():
    found = curves(detection_figure(PANELS))
    assert [len(lines) for lines in found.values()] == [2, 1]
    mean, alone = found["adversarial"][0], found["trigger"][0]
    at = dict(zip(np.round(alone[1:, 0], 3), alone[1:, 1], strict=True))
    assert at[0.1] == pytest.approx(2 / 3) and at[0.3] == 1.0
    both = dict(zip(np.round(mean[1:, 0], 3), mean[1:, 1], strict=True))
    assert both[0.5] == pytest.approx((1 + 2 / 3) / 2)


def test_it_says_on_how_many_inputs_it_stands_and_is_as_wide_as_the_others(tmp_path):
    figure = detection_figure(PANELS)
    assert "n = 3 attacked,\n4 clean" in figure.axes[0].get_title(loc="left")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["slice", "logits"]
    with Image.open(detection_curves(PANELS, tmp_path / "roc.png")) as drawn:
        assert drawn.width == 1280


def test_titles_of_panels_with_many_inputs_do_not_run_into_each_other():
    seeds = [([0.1] * (930 + 9 * seed), [0.8] * (936 + 17 * seed)) for seed in range(3)]
    panels = {
        title: {"slices, reference of the predicted class (published)": seeds}
        for title in ("No attack shown (as published)", "Other attacks shown", "Patch trigger, nothing shown")
    }
    places = words(detection_figure(panels))
    for (one, here), (other, there) in combinations(places.items(), 2):
        assert not here.overlaps(there), f"{one.get_text()!r} overlaps {other.get_text()!r}"


def test_what_cannot_be_drawn_is_refused():
    for nothing in ({}, {"adversarial": {}}):
        with pytest.raises(ValueError, match="no detector"):
            detection_figure(nothing)
    with pytest.raises(ValueError, match="4 and 0"):
        detection_figure({"adversarial": {"slice": [(GOOD[0], [])]}})
    with pytest.raises(NonFiniteError):
        detection_figure({"adversarial": {"slice": [([0.0], [float("nan")])]}})
