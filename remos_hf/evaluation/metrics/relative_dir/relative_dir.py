"""Relative DIR (rDIR) for `evaluate.load(metric_path("relative_dir"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class RelativeDir(label_metric.LabelMetric):
    """The student's defect inheritance rate over plain fine-tuning's, on one task."""

    columns = ("predictions", "references", "clean_predictions", "finetuned_predictions", "finetuned_clean_predictions")

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        clean_predictions: list[int],
        finetuned_predictions: list[int],
        finetuned_clean_predictions: list[int],
        target_label: int | None = None,
    ) -> dict:
        """Count for both students, and divide.

        Args:
            predictions: The student's labels on the exposed inputs.
            references: True labels.
            clean_predictions: The student's labels on the same inputs, clean.
            finetuned_predictions: The plainly fine-tuned student's labels on the exposed inputs.
            finetuned_clean_predictions: Its labels on the same inputs, clean.
            target_label: None counts any wrong label; a label counts only that one, on samples of other labels.

        Returns:
            relative_dir with its 95 % interval (low, high); dir and finetuned_dir with count, num_samples and interval
            each.
        """
        target_label = self._target(target_label)
        student = measures.defect_inheritance_rate(predictions, references, clean_predictions, target_label)
        finetuned = measures.defect_inheritance_rate(
            finetuned_predictions, references, finetuned_clean_predictions, target_label
        )
        return {
            **label_metric.named("relative_dir", measures.relative_dir(student, finetuned)),
            **label_metric.named("dir", student, prefix="dir_"),
            **label_metric.named("finetuned_dir", finetuned, prefix="finetuned_dir_"),
        }
