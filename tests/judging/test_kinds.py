import pytest

from remos_hf.judging.kinds import FASTER, MIXED, PLAIN, RANDOM, REMOS, REMOS_LAYER, ROWS, UNKNOWN, kind_of, kind_of_all
from remos_hf.strategies import L2SP, STRATEGIES, Finetune, Random, Remos
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.slice_and_reset import SliceAndReset


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
    assert "ReMoS" in found.name and "L2-SP" in found.name


def test_every_strategy_of_the_package_has_a_kind_of_its_own():
    recipes = [cls(**({"slice_ratio": 0.9} if issubclass(cls, SliceAndReset) else {})) for cls in STRATEGIES.values()]
    kinds = [kind_of(made(one)) for one in recipes]
    assert len({one.key for one in kinds}) == len({one.name for one in kinds}) == len(kinds)


def test_seeds_that_were_made_in_several_ways_are_of_no_kind():
    one, other = {**made(Remos(0.9)), "slice_ratio": 0.9}, {**made(Remos(0.7)), "slice_ratio": 0.7}
    assert kind_of_all([one, {**one, "seed": 3, "seconds": {"train": 2}}]) == REMOS
    assert kind_of_all([one, other]) == MIXED
    assert kind_of_all([made(Finetune()), made(Finetune(), 3.0)]) == MIXED
    assert kind_of_all([{}, {}], reference=True) == PLAIN and kind_of_all([{}, {}]) == UNKNOWN
    assert kind_of_all([{}, made(Remos(0.9))], reference=True) == MIXED
