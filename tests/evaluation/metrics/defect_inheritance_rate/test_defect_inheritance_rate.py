from remos_hf.evaluation import measures

COLUMNS = {
    "predictions": [1, 2, 0, 1, 2, 1],
    "references": [0, 1, 0, 1, 2, 2],
    "clean_predictions": [0, 1, 0, 1, 1, 1],
}


def test_it_gives_the_measure_with_and_without_a_target(load):
    metric = load("defect_inheritance_rate")
    for target in (None, 1):
        rate = measures.defect_inheritance_rate(**COLUMNS, target_label=target)
        expected = rate.to_dict() | {"defect_inheritance_rate": rate.value}
        assert metric.compute(**COLUMNS, target_label=target) | {"value": rate.value} == expected


def test_a_rate_without_samples_is_none(load):
    result = load("defect_inheritance_rate").compute(predictions=[0], references=[0], clean_predictions=[1])
    assert result == {"defect_inheritance_rate": None, "count": 0, "num_samples": 0, "low": None, "high": None}


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("defect_inheritance_rate") == (0, 5)
