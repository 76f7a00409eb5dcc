import re

from tests.showing.test_page import page_of, record, whole  # noqa: F401 - a fixture


def test_every_figure_says_its_n_and_its_seeds_and_has_an_alternative_text(whole):  # noqa: F811
    _, page = whole
    images = page.all("img")
    assert len(images) == len(page.captions) == len(page.all("figure"))
    # Accuracy, re-activation, one of the plain and four of the sliced student, training, and the map.
    assert len(images) == 9
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
