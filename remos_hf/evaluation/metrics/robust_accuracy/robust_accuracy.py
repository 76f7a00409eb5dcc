"""Robust accuracy for `evaluate.load(metric_path("robust_accuracy"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class RobustAccuracy(label_metric.LabelMetric):
    """The share of all samples that a model gets right both when clean and when attacked."""

    columns = ("predictions", "references", "clean_predictions")

    def _compute(self, predictions: list[int], references: list[int], clean_predictions: list[int]) -> dict:
        """Count the samples that hold.

        Args:
            predictions: The model's labels on the attacked inputs.
            references: True labels.
            clean_predictions: The model's labels on the same inputs, clean.

        Returns:
            robust_accuracy in [0, 1] with its count, num_samples and 95 % interval (low, high).
        """
        rate = measures.robust_accuracy(predictions, references, clean_predictions)
        return label_metric.named("robust_accuracy", rate)
