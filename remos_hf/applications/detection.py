"""Find attacked inputs, adversarial ones and those with a backdoor's trigger, by a tree on what flowed for each."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from remos_hf.applications.input_features import Observed
from remos_hf.evaluation.measures import Rate

try:
    from sklearn.metrics import roc_auc_score
    from sklearn.tree import DecisionTreeClassifier
except ImportError as error:
    raise ImportError("Detection needs scikit-learn: pip install 'remos_hf[evaluate]'.") from error


@dataclass(frozen=True)
class InputDetector:
    """A decision tree that gives every input a score from 0, clean, to 1, attacked. `fit` makes one.

    Attributes:
        tree: The tree.
        knows_attacks: Whether it was shown attacked inputs. One that was not tells the model's label from what it looks
            at, and takes an input for attacked where it would have said another.
        width: Number of features.

    Source:
        NNSlicer, ESEC/FSE 2020, section 6.1: trees as scikit-learn makes them, without attacked inputs.
        Differs: trees that are shown attacked inputs are ours.
    """

    citation: ClassVar[str] = (
        "@inproceedings{zhang2020nnslicer, title={Dynamic Slicing for Deep Neural Networks}, author={Zhang, Ziqi and "
        "Li, Yuanchun and Guo, Yao and Chen, Xiangqun and Liu, Yunxin}, booktitle={ESEC/FSE}, year={2020}}"
    )

    tree: DecisionTreeClassifier
    knows_attacks: bool
    width: int

    @classmethod
    def fit(cls, clean: Observed, attacked: Observed | None = None, *, seed: int = 0) -> "InputDetector":
        """Grow the tree.

        Args:
            clean: Inputs as they should be. Without attacked ones, give those that the model gets right.
            attacked: Inputs that were attacked with success. None for the published detector, which sees none.
            seed: Of the order in which equal splits are tried.

        Raises:
            ValueError: Features are not alike, there is no sample, or the model predicts one label for all of them.
        """
        if not len(clean) or (attacked is not None and not len(attacked)):
            raise ValueError("A detector wants at least one clean input, and an attacked one if any are given.")
        shown = clean if attacked is None else _like(clean.features.shape[1], attacked) and clean + attacked
        wanted = clean.predicted if attacked is None else np.arange(len(shown)) >= len(clean)
        if attacked is None and len(np.unique(wanted)) < 2:
            raise ValueError(
                f"The model says {wanted[0]} of all clean inputs, so there is nothing to tell labels by. Give inputs "
                "of several labels."
            )
        tree = DecisionTreeClassifier(random_state=seed).fit(shown.features.astype(np.float32, copy=False), wanted)
        return cls(tree, attacked is not None, shown.features.shape[1])

    def scores(self, seen: Observed) -> np.ndarray:
        """Give each input a score from 0, clean, to 1, attacked; shape (samples,).

        Raises:
            ValueError: Features are not those that it was made with.
        """
        _like(self.width, seen)
        if not len(seen):
            return np.zeros(0)
        shares = self.tree.predict_proba(seen.features.astype(np.float32, copy=False))
        if self.knows_attacks:
            return shares[:, list(self.tree.classes_).index(True)]
        # A label that no clean input had is one that the tree would never have said.
        return 1 - (shares * (self.tree.classes_ == seen.predicted[:, None])).sum(1)

    def flags(self, seen: Observed) -> np.ndarray:
        """Say which inputs it takes for attacked: those with a score above 0.5. Bool, shape (samples,)."""
        return self.scores(seen) > 0.5


def _like(width: int, seen: Observed) -> bool:
    if seen.features.shape[1] != width:
        raise ValueError(
            f"The detector looks at {width} features of an input, but got {seen.features.shape[1]}. Take the same "
            "InputFeatures for all inputs."
        )
    return True


@dataclass(frozen=True)
class Detection:
    """How well attacked inputs are told from clean ones.

    Attributes:
        recall: Of the attacked inputs, the share that is flagged.
        false_alarms: Of the clean inputs, the share that is flagged.
        precision: Of the flagged inputs, the share that is attacked, in [0, 1]: it falls as clean inputs get more. None
            if none is flagged.
        f1: Harmonic mean of precision and recall; None if there is no attacked input.
        auroc: Chance that an attacked input has a higher score than a clean one, ties counted half; None if there is
            none of either.
    """

    recall: Rate
    false_alarms: Rate
    precision: float | None
    f1: float | None
    auroc: float | None

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        told = {"precision": self.precision, "f1": self.f1, "auroc": self.auroc}
        return {"recall": self.recall.to_dict(), "false_alarms": self.false_alarms.to_dict(), **told}


def detection_of(clean: np.ndarray, attacked: np.ndarray) -> Detection:
    """Compare scores of clean inputs with those of attacked ones.

    Args:
        clean: As `InputDetector.scores` gives them, shape (samples,).
        attacked: Likewise; inputs whose attack failed do not belong here.

    Raises:
        ValueError: A score is none in [0, 1].
    """
    for one in (clean, attacked):
        if one.ndim != 1 or not bool(((one >= 0) & (one <= 1)).all()):
            raise ValueError("Scores are numbers from 0 to 1, one an input, as InputDetector.scores gives them.")
    caught, wrongly = (int((one > 0.5).sum()) for one in (attacked, clean))
    both = len(clean) and len(attacked)
    labels = np.arange(len(clean) + len(attacked)) >= len(clean)
    return Detection(
        recall=Rate.of(caught, len(attacked)),
        false_alarms=Rate.of(wrongly, len(clean)),
        precision=caught / (caught + wrongly) if caught + wrongly else None,
        f1=2 * caught / (caught + wrongly + len(attacked)) if len(attacked) else None,
        auroc=float(roc_auc_score(labels, np.concatenate([clean, attacked]))) if both else None,
    )
