import json

import pytest

from remos_hf.errors import RemosError
from tests.defects.attacked import attacked, needs_textattack

# Every attack starts processes that import TextAttack: seconds each, and more on a busy machine.
pytestmark = pytest.mark.timeout(400)


@needs_textattack
def test_until_fooled_leaves_no_sample_half_way_and_the_budget_holds(world):
    exposed = attacked(world, "kuleshov", until_fooled=True, query_budget=5)
    assert exposed.facts["num_goal_without_fooling"] == 0
    assert "until the label changes" in exposed.facts["replaced"]["goal"]
    assert 1 < exposed.facts["mean_queries"] <= 5


@needs_textattack
def test_an_unknown_recipe_is_answered_with_the_known_ones(world):
    with pytest.raises(ValueError, match="no recipe 'TextFoolr', but .*DeepWordBugGao2018.*TextFoolerJin2019"):
        attacked(world, "TextFoolr")


@pytest.mark.slow
@needs_textattack
def test_a_constraint_to_keep_must_be_the_recipes(world):
    with pytest.raises(ValueError, match="keep= names 'Speech', but TextFoolerJin2019 has only .*PartOfSpeech"):
        attacked(world, keep="Speech")


@pytest.mark.slow
@needs_textattack
def test_a_kept_constraint_that_lacks_its_files_says_which(world, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemosError, match="needs nltk's 'averaged_perceptron_tagger_eng'"):
        attacked(world, keep=("PartOfSpeech",))


@needs_textattack
def test_facts_name_the_constraints_used_and_those_left_out(made):
    facts = made.exposed.facts
    used, left_out = " ".join(facts["constraints"]), " ".join(facts["constraints_left_out"])
    assert "RepeatModification" in used and "sha256" in used
    assert json.loads(json.dumps(facts)) == facts
    assert "near.json" in facts["replaced"]["counter-fitted neighbours"]
    if made.recipe == "textfooler":
        assert facts["recipe"] == "TextFoolerJin2019"
        assert {name.partition("(")[0] for name in facts["constraints_left_out"]} == {
            "PartOfSpeech",
            "UniversalSentenceEncoder",
            "WordEmbeddingDistance",
        }
        assert "min_cos_sim=0.5" in left_out and not any(name in used for name in ("PartOfSpeech", "Distance"))
    else:
        assert "4 words" in used and "max_percent=0.5" in used and "max_log_prob_diff=2.0" in used
        assert "LocalThoughtVector" in used and left_out == ""
        assert set(facts["replaced"]) == {"counter-fitted neighbours", "GPT2", "ThoughtVector"}
        assert "0.7" in facts["goal_function"]
