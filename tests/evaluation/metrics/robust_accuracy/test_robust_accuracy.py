from remos_hf.evaluation import measures

COLUMNS = {
    "predictions": [0, 1, 0, 1, 2, 1],
    "references": [0, 1, 0, 1, 2, 2],
    "clean_predictions": [0, 1, 1, 1, 1, 2],
}


def test_what_is_wrong_when_clean_is_not_robust_and_counts_below_the_line(load):
    result = load("robust_accuracy").compute(**COLUMNS)
    rate = measures.robust_accuracy(**COLUMNS)
    assert (result["count"], result["num_samples"]) == (3, 6) == (rate.count, rate.num_samples)
    assert result["robust_accuracy"] == rate.value == 0.5


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("robust_accuracy") == (0, 5)
