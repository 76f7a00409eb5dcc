import re

from remos_hf.judging.judgement import judged
from remos_hf.showing.drawings import drawings_of
from tests.showing.test_page import audited, page_of, record, whole  # noqa: F401 - a fixture
from tests.showing.test_pictures import one_anatomy


def test_every_figure_says_its_n_and_its_seeds_and_has_an_alternative_text(whole):  # noqa: F811
    _, page = whole
    images = page.all("img")
    assert len(images) == len(page.captions) == len(page.all("figure"))
    # Accuracy, re-activation, four of the sliced student, training, and the map.
    assert len(images) == 8
    for _, caption in page.captions:
        assert re.search(r"n = [\d,]+", caption)
    assert all("seed" in caption for _, caption in page.captions[:-1])
    for attrs in images:
        assert len(attrs["alt"]) > 20 and int(attrs["width"]) > 0 and int(attrs["height"]) > 0


def test_an_old_report_says_that_nothing_is_known_of_the_insides(tmp_path):
    page = page_of(tmp_path, [record("finetune", 95, made_by="hand")])
    assert "What students are made of" in page.words and "Where models look" in page.words
    assert "How students were made" not in [text for _, text in page.headings]
    assert "No times were recorded." in page.words


def test_insides_are_drawn_of_few_students_of_several_teachers_ours_first():
    report = audited(("word", "ripples", "ep"))
    inside = [
        {"task": "A to B", "teacher": teacher, "student": name, "seed": 0, "anatomy": one_anatomy(name != "finetune")}
        for teacher in ("clean", "word", "ripples", "ep")
        for name in ("finetune", "random 0.9", "remos 0.9")
    ]
    report.anatomies.extend(inside)
    found = [one for one in drawings_of(report, judged(report).verdicts, ["A to B"]) if one.place[0] == "made"]
    drawn = [(one.place[1].split()[-1], *one.words) for one in found if "weight_changes" in one.words]
    assert [(teacher, "share_kept" in kinds) for teacher, *kinds in drawn] == [("“word”", True), ("“ripples”", True)]
    assert all("remos 0.9" in one.words["weight_changes"][0] for one in found if "weight_changes" in one.words)
