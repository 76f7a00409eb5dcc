import pytest

from remos_hf.auditing.made import made_by, made_by_record
from remos_hf.errors import CorruptFileError
from remos_hf.strategies import L2SP, Finetune, MagPrune, Random, Remos
from remos_hf.strategies.composed import as_strategy


@pytest.mark.parametrize(
    ("strategy", "lr_factor", "rule"),
    [
        (Remos(0.9), 1.0, "remos, model scope"),
        (Remos(0.9, scope="layer"), 1.0, "remos, layer scope"),
        (Random(0.9), 3.0, "random, lr x3"),
        (MagPrune(0.9, embedding_rows="mean"), 1.0, "mag_prune, rows mean"),
        ([Random(0.9), L2SP()], 1.0, "random + L2SP"),
    ],
)
def test_a_rule_is_told_in_words_with_what_changes_it(strategy, lr_factor, rule):
    made = made_by(as_strategy(strategy).to_dict(), lr_factor, 3)
    assert (made["rule"], made["slice_ratio"], made["lr_factor"], made["seed"]) == (rule, 0.9, lr_factor, 3)


def test_what_slices_nothing_has_its_strategy_and_no_rule():
    made = made_by(Finetune().to_dict(), 3.0, 1)
    assert made == {"strategy": Finetune().to_dict(), "lr_factor": 3.0, "seed": 1}
    assert made_by(Random(0.9, seed=7).to_dict(), 1.0, 1)["seed"] == 7


def test_a_record_tells_the_same_and_what_was_done():
    config = {
        "strategy": Random(0.9).to_dict(),
        "training": {"seed": 2, "learning_rate": 1e-4},
        "slice": {"share_kept": 0.9, "squares_reset": 0.2},
    }
    made = made_by_record(config)
    assert made.items() >= made_by(Random(0.9).to_dict(), 1.0, 2).items()
    assert (made["squares_reset"], made["share_kept"], made["learning_rate"]) == (0.2, 0.9, 1e-4)
    assert "learning_rate" not in made_by_record({"strategy": {"name": "Mine"}})


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "Both", "strategies": [1]},
        {"name": "Both", "strategies": {"a": 1}},
        {"name": "Random", "slice_ratio": "<b>"},
        {"name": "Both", "strategies": [{"name": None}]},
    ],
)
def test_a_record_that_describes_no_strategy_is_refused(strategy):
    with pytest.raises(CorruptFileError, match="none that was written here"):
        made_by_record({"strategy": strategy})
