import pytest

from remos_hf.judging.kinds import FASTER, PLAIN, RANDOM, REMOS, REMOS_LAYER, ROWS, UNKNOWN, kind_of
from remos_hf.strategies import L2SP, STRATEGIES, Finetune, Random, Remos
from remos_hf.strategies.composed import as_strategy


def made(strategy, lr_factor=1.0):
    return {"strategy": strategy.to_dict(), "lr_factor": lr_factor}


@pytest.mark.parametrize(
    ("of", "kind"),
    [
        (made(Finetune()), PLAIN),
        (made(Finetune(), 3.0), FASTER),
        (made(Finetune(embedding_rows="mean")), ROWS),
        (made(Finetune(embedding_rows="mean"), 3.0), ROWS),
        (made(Random(0.9), 3.0), RANDOM),
        (made(Remos(0.9)), REMOS),
        (made(Remos(0.9, scope="layer")), REMOS_LAYER),
        ({}, UNKNOWN),
        ({"seconds": {"measure": 1.0}}, UNKNOWN),
    ],
)
def test_the_kind_is_what_was_recorded(of, kind):
    assert kind_of(of) == kind


def test_the_reference_is_plain_fine_tuning_as_the_report_says_unless_it_was_recorded_as_something_else():
    assert kind_of({}, reference=True) == PLAIN and kind_of(made(Random(0.9)), reference=True) == RANDOM


def test_a_list_of_strategies_names_all_its_parts():
    found = kind_of(made(as_strategy([Remos(0.9), L2SP()])))
    assert "ReMoS" in found.name and "L2SP" in found.name


def test_every_strategy_of_the_package_has_a_kind_of_its_own():
    needs_ratio = {"remos", "mag_prune", "top_magnitude", "random"}
    recipes = [cls(**({"slice_ratio": 0.9} if name in needs_ratio else {})) for name, cls in STRATEGIES.items()]
    kinds = [kind_of(made(one)) for one in recipes]
    assert len({one.key for one in kinds}) == len(kinds)
