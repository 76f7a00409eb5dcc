import json

import evaluate
import numpy as np
import pytest

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import METRICS, label_metric, metric_path

COLUMNS = {
    "predictions": [1, 2, 0, 1, 2, 1],
    "references": [0, 1, 0, 1, 2, 2],
    "clean_predictions": [0, 1, 0, 1, 1, 1],
}
DIR = ("defect_inheritance_rate", "count", "num_samples")

# As strict as the accuracy of the hub, which cannot be loaded here: it refuses any other keyword.
ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        labels = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=labels)

    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.fixture
def accuracy(tmp_path):
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy/accuracy.py").write_text(ACCURACY)
    return evaluate.load(str(tmp_path / "accuracy"))


def numbers(result):
    return tuple(result[name] for name in DIR)


def some_of_each(metric):
    generator = np.random.default_rng(2)
    return {name: generator.integers(0, 2, size=40) for name in metric.columns}


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_single_samples_give_what_one_call_gives_and_it_is_flat_json(load, name):
    metric = load(name, **({} if name == "relative_accuracy" else {"target_label": 1}))
    columns = some_of_each(metric)
    at_once = metric.compute(**columns)
    for start in range(0, 40, 16):
        metric.add_batch(**{column: labels[start : start + 16] for column, labels in columns.items()})
    assert metric.compute() == at_once
    for sample in range(40):
        one = {column: int(labels[sample]) for column, labels in columns.items()}
        metric.add(prediction=one.pop("predictions"), reference=one.pop("references"), **one)
    assert metric.compute() == at_once
    assert json.loads(json.dumps(at_once)) == at_once
    assert name in at_once
    assert all(isinstance(value, int | float) for value in at_once.values())


def test_labels_may_be_kept_in_a_file_too():
    metric = evaluate.load(metric_path("defect_inheritance_rate"))
    metric.add_batch(**COLUMNS)
    metric.add_batch(**COLUMNS)
    assert numbers(metric.compute()) == (0.5, 4, 8)


def test_a_target_label_in_compute_goes_before_the_one_from_loading(load):
    metric = load("defect_inheritance_rate", target_label=2)
    assert numbers(metric.compute(**COLUMNS)) == (0.25, 1, 4)
    assert numbers(metric.compute(**COLUMNS, target_label=1)) == (0.5, 1, 2)
    assert numbers(metric.compute(**COLUMNS, target_label=0)) == (0.0, 0, 2)


def test_combined_with_a_strict_accuracy_each_takes_its_own_columns(load, accuracy):
    metric = load("defect_inheritance_rate", target_label=1)
    both = evaluate.combine([accuracy, metric, load("label_flip_rate", target_label=1)])
    both.add_batch(**COLUMNS)
    result = both.compute()
    assert result["accuracy"] == 0.5
    assert result["defect_inheritance_rate"] == 0.5
    assert result["defect_inheritance_rate_num_samples"] == 2
    assert (result["label_flip_rate"], result["label_flip_rate_num_samples"]) == (0.5, 4)
    both.add(prediction=1, reference=0, clean_predictions=0)
    assert both.compute()["defect_inheritance_rate"] == 1


def test_combined_with_our_own_one_call_is_enough(load):
    both = evaluate.combine([load("defect_inheritance_rate"), load("label_flip_rate")])
    result = both.compute(**COLUMNS, target_label=1)
    assert result["defect_inheritance_rate"] == result["label_flip_rate"] == 0.5


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([0.9, 0.1], "got float64 such as 0.9"),  # evaluate alone takes these as 0 and 0
        (np.eye(2), r"shape \(2, 2\).*argmax"),
        ([1, -100], "got -100"),
        ([1], "1 predictions, 2 references"),
    ],
)
def test_labels_are_checked_before_evaluate_cuts_them_to_integers(load, predictions, message):
    metric = load("defect_inheritance_rate")
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=[0, 1], clean_predictions=[0, 1])
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=predictions, references=[0, 1], clean_predictions=[0, 1])
    assert numbers(metric.compute(**COLUMNS)) == (0.5, 2, 4)  # nothing of it was kept


def test_a_single_sample_is_checked_too(load):
    metric = load("label_flip_rate", target_label=1)
    with pytest.raises(ValueError, match="got float64 such as 0.9"):
        metric.add(prediction=0.9, reference=0)


def test_a_missing_column_is_named(load):
    metric = load("defect_inheritance_rate")
    with pytest.raises(ValueError, match="clean_predictions is missing"):
        metric.add_batch(predictions=[0], references=[0])
    with pytest.raises(ValueError, match="clean_predictions is missing"):
        metric.add(prediction=0, reference=0)


def test_a_column_that_the_metric_does_not_know_is_refused(load):
    with pytest.raises(ValueError, match="floor_predictions"):
        load("defect_inheritance_rate").add_batch(**COLUMNS, floor_predictions=COLUMNS["predictions"])


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_describes_itself(load, name):
    metric = load(name)
    assert set(metric.features) == set(metric.columns)
    assert "Returns" in metric.inputs_description
    assert metric.description and "zhang2022remos" in metric.citation


def test_named_lays_a_number_out_flat():
    rate = measures.Rate.of(1, 4)
    plain = {"dir": 0.25, "count": 1, "num_samples": 4, "low": rate.low, "high": rate.high}
    assert label_metric.named("dir", rate) == plain
    assert list(label_metric.named("dir", rate, prefix="dir_")) == [
        "dir",
        "dir_count",
        "dir_num_samples",
        "dir_low",
        "dir_high",
    ]
