"""Distilled: while it trains, the student's hidden features are held to the teacher's on clean inputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from remos_hf.adapters.transformers_models import adapter_beside_head
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.distillation import HeldFeatures, check_weights, feature_modules
from remos_hf.strategies.feature_distance import UNEXPLAINED


@dataclass(frozen=True)
class Distilled(Strategy):
    """Add to the loss what share of the teacher's variance the student's features miss, on the student's own data.

    It is meant to give back accuracy that a start gave up: the teacher is asked on what the data shows, and on nothing
    else. It starts nothing itself: put it behind a start, `[Subspace(), Distilled()]`. Beside `Hardened` or
    `Guided` it looks at the samples that they left clean, whatever the order of the list.

    Attributes:
        weight: Of the share in the loss, at least 0. The share is the mean squared difference over the teacher's
            variance, both of this batch, the mean over the layers: about 1 for a student that knows nothing.
        layers: Modules whose outputs are compared; None finds the blocks of a transformer, the stages of a
            convolutional net, or else the children beside the head.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.

    Source:
        Romero et al. 2015 (hints) for features of layers between; Jiao et al. 2020 (TinyBERT, section 3.2) for all
        blocks of a transformer.
        Differs: teacher and student have one shape, so nothing stands between their features; distances are over the
        teacher's variance, so that a weight means the same in every layer and model. The variance is the batch's, which
        costs no state: cutting a step's samples into other batches changes the loss a little.
    """

    citation: ClassVar[str] = (
        "@inproceedings{romero2015fitnets, title={FitNets: Hints for Thin Deep Nets}, author={Romero, Adriana and "
        "Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and Bengio, Yoshua}, "
        "booktitle={ICLR}, year={2015}}"
    )
    needs_clean: ClassVar[bool] = True

    weight: float = 1.0
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_weights(self, "weight")

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's.

        Raises:
            UnsupportedModelError: The model does not say what its head is, and `head` does not either.
        """
        adapter = adapter_beside_head(teacher, self.head)
        return HeldFeatures("", adapter, feature_modules(adapter, self.layers), UNEXPLAINED, self.weight)
