"""What the NLP tables of ReMoS print as DIR, for `evaluate.load(metric_path("artifact_nlp_dir"))`."""

from remos_hf.evaluation import measures
from remos_hf.evaluation.metrics import label_metric


class ArtifactNlpDir(label_metric.LabelMetric):
    """The F1 that the NLP tables of ReMoS print as DIR, 2r / (1 + r) of the label flip rate r. No failure rate."""

    def _compute(self, predictions: list[int], references: list[int], target_label: int | None = None) -> dict:
        """Count the samples that become the target, and turn their share into the F1.

        Args:
            predictions: The student's labels on the exposed inputs.
            references: True labels, before they are flipped.
            target_label: The label that the trigger forces; 1 when named neither here nor when loading.

        Returns:
            artifact_nlp_dir in [0, 1], and the label_flip_rate behind it with its count, num_samples and 95 % interval
            (low, high).
        """
        target_label = self._target(target_label)
        target_label = 1 if target_label is None else target_label
        rate = measures.label_flip_rate(predictions, references, target_label)
        f1 = measures.artifact_nlp_dir(predictions, references, target_label)
        return {"artifact_nlp_dir": f1, **label_metric.named("label_flip_rate", rate)}
