"""Defect inheritance rate (DIR) for `evaluate.load(metric_path("defect_inheritance_rate"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class DefectInheritanceRate(label_metric.LabelMetric):
    """Of the samples that the student gets right when clean, the share that fail when exposed."""

    columns = ("predictions", "references", "clean_predictions")

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        clean_predictions: list[int],
        target_label: int | None = None,
    ) -> dict:
        """Count the samples that fail.

        Args:
            predictions: The student's labels on the exposed inputs.
            references: True labels.
            clean_predictions: The student's labels on the same inputs, clean.
            target_label: None counts any wrong label; a label counts only that one, on samples of other labels.

        Returns:
            defect_inheritance_rate in [0, 1] with its count, num_samples and 95 % interval (low, high).
        """
        target_label = self._target(target_label)
        rate = measures.defect_inheritance_rate(predictions, references, clean_predictions, target_label)
        return label_metric.named("defect_inheritance_rate", rate)
