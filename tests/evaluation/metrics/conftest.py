import doctest
from pathlib import Path

import evaluate
import pytest

from remos_hf.evaluation.metrics import metric_path


@pytest.fixture
def load():
    """Load one of our metrics as a user does; nothing is written but the copy of its script."""

    def load(name, **options):
        return evaluate.load(metric_path(name), keep_in_memory=True, **options)

    return load


@pytest.fixture
def run_card():
    """Run the examples of a metric's card; give how many were run and how many failed."""

    def run_card(name):
        card = Path(metric_path(name), "README.md").read_text().replace("```", "\n")
        examples = doctest.DocTestParser().get_doctest(card, {}, name, "README.md", 0)
        return doctest.DocTestRunner().run(examples)

    return run_card
