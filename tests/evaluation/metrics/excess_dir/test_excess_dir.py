from remos_hf.evaluation import measures

COLUMNS = {
    "predictions": [1, 2, 0, 1, 2, 1],
    "references": [0, 1, 0, 1, 2, 2],
    "clean_predictions": [0, 1, 0, 1, 1, 1],
}
FLOOR = {"floor_predictions": [0, 2, 1, 1, 1, 2], "floor_clean_predictions": [0, 1, 0, 1, 2, 0]}


def test_it_gives_the_students_rate_minus_the_twins(load):
    for target in (None, 1):
        rate = measures.defect_inheritance_rate(**COLUMNS, target_label=target)
        floor = measures.defect_inheritance_rate(
            FLOOR["floor_predictions"], COLUMNS["references"], FLOOR["floor_clean_predictions"], target
        )
        excess = measures.excess_dir(rate, floor)
        result = load("excess_dir").compute(**COLUMNS, **FLOOR, target_label=target)
        assert (result["excess_dir"], result["low"], result["high"]) == (excess.value, excess.low, excess.high)
        assert (result["dir"], result["dir_count"], result["dir_num_samples"]) == (
            rate.value,
            rate.count,
            rate.num_samples,
        )
        assert (result["floor_dir"], result["floor_dir_count"], result["floor_dir_num_samples"]) == (
            floor.value,
            floor.count,
            floor.num_samples,
        )


def test_a_target_label_may_be_named_when_loading(load):
    named_then = load("excess_dir", target_label=1).compute(**COLUMNS, **FLOOR)
    assert named_then == load("excess_dir").compute(**COLUMNS, **FLOOR, target_label=1)
    assert named_then != load("excess_dir").compute(**COLUMNS, **FLOOR)


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("excess_dir") == (0, 5)
