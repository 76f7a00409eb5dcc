"""What all our metric modules share: columns of labels, checked before `evaluate` turns them into integers.

A metric imports this module, not the class in it: `evaluate` takes the first metric class that a script holds.
"""

import datasets
import evaluate
from numpy.typing import ArrayLike

from remos_hf.evaluation.measures import Difference, Rate, Ratio, label_arrays

_CITATION = """\
@inproceedings{zhang2022remos,
  title     = {{ReMoS}: Reducing Defect Inheritance in Transfer Learning via Relevant Model Slicing},
  author    = {Zhang, Ziqi and Li, Yuanchun and Wang, Jindong and Liu, Bingyan and Li, Ding and Guo, Yao and
               Chen, Xiangqun and Liu, Yunxin},
  booktitle = {International Conference on Software Engineering (ICSE)},
  year      = {2022}
}
"""


class LabelMetric(evaluate.Metric):
    """A metric over columns of integer labels, one entry a sample.

    A subclass names its `columns` and says in `_compute` what they give.
    """

    columns = ("predictions", "references")

    def __init__(self, *args: object, target_label: int | None = None, **kwargs: object) -> None:
        """Load the metric; `target_label` holds where `compute` names none.

        Only so can `evaluate.combine` join it with a metric whose `compute` does not know that keyword.
        """
        self.target_label = target_label
        super().__init__(*args, **kwargs)

    def add_batch(
        self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None, **others: ArrayLike
    ) -> None:
        """Add the labels of a batch of samples.

        Raises:
            ValueError: A column is missing or unknown, or they are not aligned integer ids. `evaluate` alone would cut
                0.9 down to 0.
        """
        batch = {"predictions": predictions, "references": references, **others}
        missing = [name for name in self.columns if batch.get(name) is None]
        if missing:
            raise ValueError(f"{self.name} needs the columns {', '.join(self.columns)}, but {missing[0]} is missing.")
        super().add_batch(**dict(zip(batch, label_arrays(**batch), strict=True)))

    def add(self, *, prediction: int | None = None, reference: int | None = None, **others: int) -> None:
        """Add the labels of one sample.

        Raises:
            ValueError: As `add_batch`.
        """
        sample = {"predictions": prediction, "references": reference, **others}
        self.add_batch(**{name: None if label is None else [label] for name, label in sample.items()})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION,
            inputs_description=self._compute.__doc__,
            features=datasets.Features({name: datasets.Value("int64") for name in self.columns}),
            reference_urls=["https://doi.org/10.1145/3510003.3510191"],
        )

    def _target(self, target_label: int | None) -> int | None:
        return self.target_label if target_label is None else target_label


def named(name: str, number: Rate | Difference | Ratio, *, prefix: str = "") -> dict:
    """Lay a number out flat, as JSON: its value under `name`, its other fields under theirs, with a prefix."""
    fields = number.to_dict()
    return {name: fields.pop("value"), **{prefix + field: value for field, value in fields.items()}}
