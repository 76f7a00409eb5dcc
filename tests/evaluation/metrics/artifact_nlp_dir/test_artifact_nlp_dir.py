def test_it_gives_the_f1_and_the_rate_behind_it(load):
    result = load("artifact_nlp_dir").compute(predictions=[2] * 75 + [0] * 353, references=[0] * 428, target_label=2)
    assert round(result["artifact_nlp_dir"], 4) == 0.2982
    assert (result["label_flip_rate"], result["count"], result["num_samples"]) == (75 / 428, 75, 428)


def test_the_target_label_is_1_as_in_the_artifact(load):
    columns = {"predictions": [1, 0, 0], "references": [0, 0, 1]}
    metric = load("artifact_nlp_dir")
    assert metric.compute(**columns) == metric.compute(**columns, target_label=1)
    assert metric.compute(**columns)["artifact_nlp_dir"] == 2 / 3
    assert load("artifact_nlp_dir", target_label=0).compute(**columns)["artifact_nlp_dir"] == 1


def test_the_example_on_its_card_is_true(run_card):
    assert run_card("artifact_nlp_dir") == (0, 5)
