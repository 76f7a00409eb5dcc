"""Label flip rate (LFR, attack success rate) for `evaluate.load(metric_path("label_flip_rate"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class LabelFlipRate(label_metric.LabelMetric):
    """Of the samples whose true label is not the target, the share that become the target when exposed."""

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        target_label: int | None = None,
        clean_predictions: list[int] | None = None,
    ) -> dict:
        """Count the samples that become the target.

        Args:
            predictions: The student's labels on the exposed inputs.
            references: True labels.
            target_label: The label that the trigger forces; needed here or when loading.
            clean_predictions: The student's labels on the clean inputs, for `compute` only. Given, only samples right
                when clean count: the targeted defect inheritance rate.

        Returns:
            label_flip_rate in [0, 1] with its count, num_samples and 95 % interval (low, high).
        """
        target_label = self._target(target_label)
        rate = measures.label_flip_rate(predictions, references, target_label, clean_predictions)
        return label_metric.named("label_flip_rate", rate)
