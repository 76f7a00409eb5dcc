import html
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from remos_hf.judging.explained import explained
from remos_hf.profiling.reference import Reference
from remos_hf.showing.explanation_page import contribution_map, write_explanation_page
from remos_hf.slicing.explanation import Explanation, LayerFlow, NeuronFlow, explain
from tests import tiny
from tests.showing.test_page import CHROMIUM, HOSTILE, LOOK, Page


def made(inputs, **options):
    strongest = (NeuronFlow(3, 1_234_567, -89), NeuronFlow(0, 0, -5), NeuronFlow(1, 2, -2))
    layers = [
        LayerFlow(
            f"a_model.of.long.names.layer.{HOSTILE}.{number}.weight", 3_000_000, -1_000_000, 8, 4, 40, 5, strongest
        )
        for number in range(3)
    ]
    empty = LayerFlow("head.weight", 0, 0, 8, 0, 40, 0, ())
    given = {"theta": 0.2, "reference": "zero", "reference_samples": 0, "labels": (HOSTILE, "dog"), **options}
    return Explanation(1, (0.5, 1.5), 1.0, (*layers, empty), inputs, **given)


@pytest.fixture
def page(tmp_path):
    def written(found, **options):
        said = explained(found, tokens=options.get("tokens", ()))
        return write_explanation_page(found, said, tmp_path / "explanation.html", **options).read_text()

    return written


def of_text():
    return made({"words.weight": torch.tensor([5, -2, 0])})


def of_image(side=8):
    found = torch.zeros(side, side, dtype=torch.int64)
    found[0, 1], found[2, 3] = 4, -4
    return made({"pixel_values": found}), torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))


TOKENS = [("good", 5), (HOSTILE + "\u202e", -2), ("the", 0)]


class TestThePage:
    def test_says_the_answer_and_its_limits_then_the_input_then_each_layer(self, page):
        text = page(of_text(), tokens=TOKENS, command="remos explain x y")
        said = explained(of_text(), tokens=TOKENS)
        places = [text.index(one) for one in ("The model says", said.limits[0][:30], 'id="input"', 'id="layers"')]
        assert places == sorted(places) and text.count('class="flow"') == 4 and "remos explain x y" in text
        assert "<script" not in text and "\u202e" not in text and Page(text)

    def test_bars_are_shares_of_a_layer_and_numbers_stand_beside_them(self, page):
        text = page(of_text())
        assert text.count('<i class="for"><span style="width: 75.00%">') == 3
        assert text.count('<i class="against"><span style="width: 25.00%">') == 3
        assert text.count("+3,000,000") == 3 and text.count("−1,000,000") == 3
        assert text.count("4 of 8 neurons") == 3 and text.count("12.5 % of 40 weights") == 3
        signs = re.findall(r'<li class="(\w+)">\d+: ', text)
        assert signs == ["for", "against", "none"] * 3

    def test_tokens_are_coloured_by_sign_and_strength_with_their_numbers(self, page):
        text = page(of_text(), tokens=TOKENS)
        shown = re.findall(r'<li class="(\w+)" style="--share: ([\d.]+)">', text)
        assert shown == [("for", "1.000"), ("against", "0.400"), ("none", "0.000")]
        assert "good<small>+5</small>" in text and "words.weight: +5 and −2 in all" in text

    def test_an_image_is_drawn_as_the_model_reads_it_and_with_its_map(self, page):
        found, image = of_image()
        text = page(found, image=image)
        assert text.count("<img ") == 2 and "−4 to +4 a pixel" in text and "cells" not in text

    def test_a_large_image_is_drawn_in_cells_too(self, page):
        found, image = of_image(112)
        text = page(found, image=image)
        assert text.count("<img ") == 3 and "14 x 14 cells" in text and "0 to 0 a cell" in text

    def test_it_says_what_cannot_be_said(self, page):
        nothing = explain(tiny.mlp(sizes=(5, 2)).eval(), torch.zeros(1, 5), Reference())
        assert 'class="answer unsaid"' in page(nothing)

    def test_it_needs_nothing_from_elsewhere(self, page):
        found, image = of_image()
        text = page(found, image=image)
        assert not re.search(r'(src|href)="(?!data:|#)', text) and "url(" not in text

    def test_an_image_that_was_not_explained_is_refused(self, page):
        with pytest.raises(ValueError, match="The image has 8 x 8 pixels, but what was explained has the shapes"):
            page(of_text(), image=of_image()[1])


class TestTheMap:
    def test_what_helped_is_blue_and_what_did_not_is_orange_on_a_pale_image(self):
        found, image = of_image()
        drawn = np.asarray(contribution_map(found.inputs["pixel_values"], image))
        assert drawn[0, 1].tolist() == [0, 114, 178] and drawn[2, 3].tolist() == [213, 94, 0]
        others = np.delete(drawn.reshape(-1, 3), [1, 19], axis=0)
        assert (others == others[:, :1]).all() and others.min() >= 160

    def test_nothing_is_an_image_without_colour(self):
        drawn = np.asarray(contribution_map(torch.zeros(4, 4, dtype=torch.int64), torch.ones(1, 4, 4)))
        assert (drawn == 255).all() and isinstance(
            contribution_map(torch.zeros(4, 4), torch.ones(1, 4, 4)), Image.Image
        )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in REMOS_HF_CHROMIUM or on PATH (chromium, google-chrome)")
def test_in_chromium_nothing_lies_outside_a_window_or_a_phone(page, tmp_path):
    found, image = of_image(112)
    pages = [page(found, image=image), page(of_text(), tokens=TOKENS * 20)]
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        for text in pages
        for width in (1280, 390)
    )
    wrapped = tmp_path / "wrapped.html"
    wrapped.write_text(f"<!doctype html><meta charset=utf-8><body style='margin:0;width:1400px'>{frames}{LOOK}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1400,900"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapped.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    looked = json.loads(html.unescape(re.search(r"told:(\[\{.*?\}\])<", shown, re.DOTALL)[1]))
    assert len(looked) == 4
    for one in looked:
        assert one["wide"] <= one["width"] and one["outside"] == [] and one["scroll"] == 0, one
