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


def test_the_committed_files_are_those_that_are_rendered_now(rendered):
    assert {path.relative_to(CARDS).as_posix() for path in CARDS.rglob("*.*") if path.is_file()} == set(rendered)
    for name, text in rendered.items():
        assert (CARDS / name).read_text(encoding="utf-8") == text, f"{name}: run python benchmarks/render_cards.py"


def test_every_card_says_that_its_weights_are_not_there_and_publishes_no_figure_as_theirs(rendered):
    for name, text in rendered.items():
        if "/" in name:
            continue
        assert "**The weights are not uploaded.**" in text and "from_pretrained" not in text
        assert "this student" not in text
        data = ModelCard(text).data
        assert data.eval_results is None
        assert data.pipeline_tag == ("image-classification" if name.startswith("cifar") else "text-classification")
        assert data.library_name == (None if name.startswith("cifar") else "transformers")


def test_a_card_of_two_seeds_compares_nothing(rendered):
    text = rendered["sst-2-to-sst-2-word-remos-0.9.md"]
    assert "Nothing can be said of students made this way: 2 seeds" in text and "inherits 9" not in text
    assert "at 3 times the learning rate" in rendered["sst-2-to-sst-2-word-finetune-lr-x3.md"]
    assert "we poisoned" not in rendered["sst-2-to-sst-2-textfooler-remos-0.9.md"]
    assert "Nothing was measured" in rendered["glue-sst2-remos.md"]
