"""Relative accuracy (rACC) for `evaluate.load(metric_path("relative_accuracy"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class RelativeAccuracy(label_metric.LabelMetric):
    """The student's accuracy over plain fine-tuning's, on one task."""

    columns = ("predictions", "references", "finetuned_predictions")

    def _compute(self, predictions: list[int], references: list[int], finetuned_predictions: list[int]) -> dict:
        """Count for both students, and divide.

        Args:
            predictions: The student's labels.
            references: True labels.
            finetuned_predictions: The plainly fine-tuned student's labels on the same inputs.

        Returns:
            relative_accuracy with its 95 % interval (low, high); accuracy and finetuned_accuracy with count,
            num_samples and interval each.
        """
        student = measures.accuracy(predictions, references)
        finetuned = measures.accuracy(finetuned_predictions, references)
        return {
            **label_metric.named("relative_accuracy", measures.relative_accuracy(student, finetuned)),
            **label_metric.named("accuracy", student, prefix="accuracy_"),
            **label_metric.named("finetuned_accuracy", finetuned, prefix="finetuned_accuracy_"),
        }
