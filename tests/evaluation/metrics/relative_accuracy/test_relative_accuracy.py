from remos_hf.evaluation import measures


def test_it_gives_the_students_accuracy_over_plain_fine_tunings(load):
    result = load("relative_accuracy").compute(
        predictions=[0, 1, 1, 1], references=[0, 1, 0, 1], finetuned_predictions=[0, 0, 1, 1]
    )
    student, finetuned = measures.Rate.of(3, 4), measures.Rate.of(2, 4)
    ratio = measures.relative_accuracy(student, finetuned)
    assert (result["relative_accuracy"], result["low"], result["high"]) == (1.5, ratio.low, ratio.high)
    assert (result["accuracy"], result["accuracy_count"], result["accuracy_low"]) == (0.75, 3, student.low)
    assert (result["finetuned_accuracy"], result["finetuned_accuracy_num_samples"]) == (0.5, 4)


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("relative_accuracy") == (0, 5)
