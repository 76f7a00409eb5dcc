import pytest

from remos_hf.evaluation import measures

COLUMNS = {"predictions": [1, 2, 0, 1, 2, 1], "references": [0, 1, 0, 1, 2, 2]}
CLEAN = [0, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("more", [{}, {"clean_predictions": CLEAN}])
def test_it_gives_the_measure_of_all_or_of_those_right_when_clean(load, more):
    rate = measures.label_flip_rate(**COLUMNS, target_label=1, **more)
    result = load("label_flip_rate").compute(**COLUMNS, target_label=1, **more)
    assert result | {"value": rate.value} == rate.to_dict() | {"label_flip_rate": rate.value}
    assert result["num_samples"] == (2 if more else 4)


def test_without_a_target_label_it_asks_for_one(load):
    with pytest.raises(ValueError, match="target_label is one integer label id"):
        load("label_flip_rate").compute(**COLUMNS)


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("label_flip_rate") == (0, 5)
