"""Excess DIR over the benign floor, for `evaluate.load(metric_path("excess_dir"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class ExcessDir(label_metric.LabelMetric):
    """The student's defect inheritance rate minus that of its benign twin, whose teacher was never poisoned."""

    columns = ("predictions", "references", "clean_predictions", "floor_predictions", "floor_clean_predictions")

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        clean_predictions: list[int],
        floor_predictions: list[int],
        floor_clean_predictions: list[int],
        target_label: int | None = None,
    ) -> dict:
        """Count for both students, and subtract.

        Args:
            predictions: The student's labels on the exposed inputs.
            references: True labels.
            clean_predictions: The student's labels on the same inputs, clean.
            floor_predictions: The benign twin's labels on the exposed inputs.
            floor_clean_predictions: The benign twin's labels on the same inputs, clean.
            target_label: None counts any wrong label; a label counts only that one, on samples of other labels.

        Returns:
            excess_dir in [-1, 1] with its 95 % interval (low, high); dir and floor_dir with count, num_samples and
            interval each.
        """
        target_label = self._target(target_label)
        rate = measures.defect_inheritance_rate(predictions, references, clean_predictions, target_label)
        floor = measures.defect_inheritance_rate(floor_predictions, references, floor_clean_predictions, target_label)
        return {
            **label_metric.named("excess_dir", measures.excess_dir(rate, floor)),
            **label_metric.named("dir", rate, prefix="dir_"),
            **label_metric.named("floor_dir", floor, prefix="floor_dir_"),
        }
