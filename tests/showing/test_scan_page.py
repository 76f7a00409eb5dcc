import html
import json
import re
import subprocess

import pytest

from remos_hf.judging.scan_judgement import ScanJudgement, judged_scan
from remos_hf.judging.tables import Table
from remos_hf.scanning.suspects import Effect, Scan, Suspect
from remos_hf.showing.scan_page import write_scan_page
from tests.judging.test_scan_judgement import SIZES, scan
from tests.showing.test_page import CHROMIUM, HOSTILE, LOOK

PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg=="  # one pixel
)


def of_patches(**options):
    made = scan(SIZES, names=(HOSTILE, "dog", "cat", "a class of a long name", "e", "f"), **options)
    return Scan(
        "patch", made.suspects, made.labels, 6, settings={**made.settings, "pictures": {"3": PICTURE, "0": PICTURE}}
    )


def of_tokens():
    hostile = "\x1b[31m\u202ecf</td>" + HOSTILE
    suspects = [
        Suspect(0, "cf mn", 7.25, Effect(99, 100, 6.0), Effect(2, 90, -3.0), (5, 6)),
        Suspect(0, hostile, 5.5, Effect(9, 100, -1.0), Effect(8, 90, -1.5), (7,), seen=True),
        Suspect(1, "good", 4.0, Effect(0, 0, None), None, (8,)),
    ]
    left_out = {"that the data shows": 40}
    made = Scan("tokens", tuple(suspects), ("negative", HOSTILE), 20, left_out, {"seed": 0})
    glance = Table("The strongest of each class", ("class", "tokens"), [["negative", "“cf mn”"], [HOSTILE, "“good”"]])
    return made, ScanJudgement("Suspicious.", ["Run `remos audit`."], ["No proof."], True, (suspects[0],), glance)


@pytest.fixture
def page(tmp_path):
    def written(made, said=None, **options):
        return write_scan_page(made, said or judged_scan(made), tmp_path / "scan.html", **options).read_text()

    return written


def test_the_answer_stands_first_then_what_to_do_then_the_table(page):
    made = of_patches()
    text, said = page(made), judged_scan(made)
    places = [text.index(html.escape(one, quote=False)) for one in (said.answer[:40], said.advice[0][:30])]
    assert places == sorted(places) and places[1] < text.index("<table") < text.index('id="changes"')
    assert text.count('<tr role="row" class="inherited">') == 1 and "0.17" in text


def test_each_class_has_its_change_drawn_with_bars_the_smallest_first(page):
    text = page(of_patches(beside=[0.06] * 6))
    assert text.count('class="bar ') == 12 and text.count(f"base64,{PICTURE}") == 2
    assert text.count("not drawn") == 4 and "Only the 2 smallest of 6 are drawn" in text
    assert text.index('<li class="inherited">') < text.index("<li>")
    assert 'style="width: 14.29%"' in text and 'style="width: 85.71%"' in text


def test_tokens_stand_beside_the_reference_and_nothing_in_them_acts(page):
    made, said = of_tokens()
    text = page(made, said, command="remos scan x")
    assert "“cf mn”" in text and "99.0 (100)" in text and "2.2 (90)" in text and "40 that the data shows" in text
    assert "\\x1b[31m\\u202ecf" in text and "\x1b" not in text and "\u202e" not in text
    assert "<script" not in text and "remos scan x" in text
    assert text.count('class="inherited"') == 2  # the class, and the token


def test_what_cannot_be_said_is_marked(page):
    assert 'class="answer unsaid"' in page(scan_of_two()) and "No clean reference was given" in page(scan_of_two())


def scan_of_two():
    made = scan([0.1, 0.2])
    return Scan("patch", made.suspects, made.labels, 2, settings={**made.settings, "pictures": {}})


def test_the_page_needs_nothing_from_elsewhere_and_shows_settings_without_pictures(page):
    text = page(of_patches())
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "url(" not in text
    assert text.count(PICTURE) == 2 and "reference_sizes" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in REMOS_HF_CHROMIUM or on PATH (chromium, google-chrome)")
def test_in_chromium_nothing_lies_outside_a_window_or_a_phone(page, tmp_path):
    pages = [page(of_patches(beside=[0.06] * 6)), page(*of_tokens())]
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
    found = json.loads(html.unescape(re.search(r"told:(\[\{.*?\}\])<", shown, re.DOTALL)[1]))
    for one in found:
        assert one["wide"] <= one["width"] and one["outside"] == [] and one["scroll"] == 0, one
