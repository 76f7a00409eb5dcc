from remos_hf.evaluation import measures

COLUMNS = {
    "predictions": [1, 2, 0, 1, 2, 1],
    "references": [0, 1, 0, 1, 2, 2],
    "clean_predictions": [0, 1, 0, 1, 1, 1],
}
FINETUNED = {"finetuned_predictions": [1, 2, 1, 1, 1, 2], "finetuned_clean_predictions": [0, 1, 0, 1, 2, 0]}


def test_it_gives_the_students_rate_over_plain_fine_tunings(load):
    for target in (None, 1):
        student = measures.defect_inheritance_rate(**COLUMNS, target_label=target)
        finetuned = measures.defect_inheritance_rate(
            FINETUNED["finetuned_predictions"],
            COLUMNS["references"],
            FINETUNED["finetuned_clean_predictions"],
            target,
        )
        ratio = measures.relative_dir(student, finetuned)
        result = load("relative_dir").compute(**COLUMNS, **FINETUNED, target_label=target)
        assert (result["relative_dir"], result["low"], result["high"]) == (ratio.value, ratio.low, ratio.high)
        assert (result["dir"], result["dir_count"]) == (student.value, student.count)
        assert (result["finetuned_dir"], result["finetuned_dir_count"], result["finetuned_dir_num_samples"]) == (
            finetuned.value,
            finetuned.count,
            finetuned.num_samples,
        )


def test_a_target_label_may_be_named_when_loading(load):
    named_then = load("relative_dir", target_label=1).compute(**COLUMNS, **FINETUNED)
    assert named_then == load("relative_dir").compute(**COLUMNS, **FINETUNED, target_label=1)
    assert named_then != load("relative_dir").compute(**COLUMNS, **FINETUNED)


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("relative_dir") == (0, 5)
