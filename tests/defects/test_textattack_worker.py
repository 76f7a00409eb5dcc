import pytest

from remos_hf.errors import RemosError
from tests.defects.attacked import attacked, needs_textattack, rows_of

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


@pytest.mark.slow
@needs_textattack
def test_a_recipe_that_draws_letters_draws_the_same_with_two_workers(world):
    one, two = (attacked(world, "DeepWordBugGao2018", workers=workers) for workers in (1, 2))
    assert len(one) > 0
    assert rows_of(one) == rows_of(two)


@needs_textattack
def test_missing_stop_words_are_named_with_what_to_do(world, monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemosError, match="corpora/stopwords/english is not on this machine.*stopwords="):
        attacked(world, "kuleshov", stopwords=None)
