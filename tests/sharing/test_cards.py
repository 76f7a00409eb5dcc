"""The committed cards are what the script renders, and hold no figure that no measurement gave."""

import importlib.util
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"


@pytest.fixture(scope="module")
def rendered():
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "benchmarks" / "render_cards.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.cards()


def test_the_committed_cards_are_those_that_are_rendered_now(rendered):
    assert {path.name for path in CARDS.glob("*.md")} == set(rendered)
    for name, text in rendered.items():
        assert (CARDS / name).read_text(encoding="utf-8") == text, f"{name}: run python benchmarks/render_cards.py"


def test_every_card_says_that_its_weights_are_not_there_and_can_be_read_by_the_hub(rendered):
    for name, text in rendered.items():
        assert "**The weights are not uploaded.**" in text and "from_pretrained" not in text
        data = ModelCard(text).data
        images = name.startswith("cifar")
        assert data.pipeline_tag == ("image-classification" if images else "text-classification")
        assert data.library_name == (None if images else "transformers")


def test_a_rule_that_a_random_reset_equals_is_told_so(rendered):
    text = rendered["sst-2-to-sst-2-word-remos-0.9.md"]
    assert "NOT shown to have inherited less than a random reset" in text
    image = rendered["cifar-10-patch-remos-0.97.md"]
    assert "There is no comparison at equal accuracy" in image and "At equal accuracy the student" not in image
    assert "nothing was done against inheriting" in rendered["sst-2-to-sst-2-word-finetune.md"]
    assert "Nothing was measured" in rendered["glue-sst2-remos.md"]
