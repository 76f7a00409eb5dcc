"""The measures as modules for `evaluate.load(metric_path(name))`: offline, one folder a metric, its card beside it."""

from pathlib import Path

METRICS = (
    "artifact_nlp_dir",
    "defect_inheritance_rate",
    "excess_dir",
    "label_flip_rate",
    "relative_accuracy",
    "relative_dir",
    "robust_accuracy",
)


def metric_path(name: str) -> str:
    """Say where a metric lies, for `evaluate.load`, which needs the extra `pip install remos_hf[evaluate]`.

    Args:
        name: One of `METRICS`.

    Returns:
        The metric's folder.

    Raises:
        ValueError: There is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"name is one of {', '.join(METRICS)}, but got {name!r}.")
    return str(Path(__file__).parent / name)
