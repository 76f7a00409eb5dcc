"""What kind of student a row is: as it was recorded, never guessed from its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What students have in common whatever their slice ratio and their seed.

    Attributes:
        key: Stable: colours and markers go by it, in all reports.
        name: In the middle of a sentence.
    """

    key: str
    name: str


PLAIN = Kind("plain", "plain fine-tuning")
FASTER = Kind("faster", "a higher learning rate")
RETRAIN = Kind("retrain", "training from scratch")
RANDOM = Kind("random", "a random reset")
REMOS = Kind("remos", "ReMoS")
REMOS_LAYER = Kind("remos_layer", "ReMoS layer by layer")
TOP_MAGNITUDE = Kind("top_magnitude", "resetting the largest weights")
MAG_PRUNE = Kind("mag_prune", "resetting the smallest weights")
ROWS = Kind("rows", "resetting the embedding rows of unseen tokens")
SUBSPACE = Kind("subspace", "a subspace start")
RIDGE = Kind("ridge", "a ridge start")
HARDENED = Kind("hardened", "hardening")
GUIDED = Kind("guided", "teacher-guided hardening")
DISTILLED = Kind("distilled", "distillation on clean inputs")
REPAIRED = Kind("repaired", "repairing embedding rows")
OWN = Kind("own_backdoors", "resetting channels by own backdoors")
ACTIVATION = Kind("activation", "ReMoS layer by layer with ranked activations")
GRADIENT = Kind("gradient", "ReMoS layer by layer with gradient relevance")
TEACHER = Kind("teacher", "the teacher")
UNKNOWN = Kind("unknown", "a student whose making is not recorded")
MIXED = Kind("mixed", "students made in several ways under one name")


def together(*kinds: Kind) -> Kind:
    """Give the kind of students that are started and held in several ways at once."""
    return Kind(" + ".join(one.key for one in kinds), " with ".join(one.name for one in kinds))


# What `slice_ratio=` does: its row and its accuracy are always shown.
PUBLISHED = REMOS
# The best of our tables of images and of texts, which audits make (cli/options.py): shown first wherever measured.
BEST = (together(SUBSPACE, HARDENED), REPAIRED)

_RULES = {
    "Random": RANDOM,
    "TopMagnitude": TOP_MAGNITUDE,
    "MagPrune": MAG_PRUNE,
    "Retrain": RETRAIN,
    "Hardened": HARDENED,
    "Guided": GUIDED,
    "Distilled": DISTILLED,
    "RepairRows": REPAIRED,
    "OwnBackdoors": OWN,
    "RelativeUpdate": Kind("relative_update", "resetting what a trial moves least"),
    "NNSlicer": Kind("nnslicer", "NNSlicer"),
    "SeaM": Kind("seam", "SeaM"),
    "L2SP": Kind("l2sp", "L2-SP"),
    "Delta": Kind("delta", "DELTA"),
    "DeltaR": Kind("delta_r", "DELTA-R"),
    "Renofeation": Kind("renofeation", "Renofeation"),
    "FeatureLwF": Kind("feature_lwf", "feature-LwF"),
    "Recipe": Kind("recipe", "RECIPE"),
    "DiSec": Kind("disec", "DiSec"),
    "Crow": Kind("crow", "CROW"),
    "AdversarialTraining": Kind("adversarial_training", "adversarial training"),
    "Neft": Kind("neft", "NEFT"),
}


def kind_of(made: Mapping[str, Any], *, reference: bool = False) -> Kind:
    """Tell the kind of a student from the record of how it was made.

    Args:
        made: The record's "made"; empty where nothing is known.
        reference: Whether the report names it as plain fine-tuning.

    Returns:
        The kind; of a strategy that has no word here, one named after its class, and of several, after all of them.
    """
    strategy = made.get("strategy") or {}
    parts = strategy.get("strategies") or ([strategy] if strategy.get("name") else [])
    if not parts:
        return PLAIN if reference else UNKNOWN
    kinds = [_kind_of_one(one) for one in parts]
    if len(kinds) > 1:
        return together(*kinds)
    if kinds[0] is PLAIN and made.get("lr_factor", 1) > 1:
        return FASTER
    return kinds[0]


def kind_of_all(several: Sequence[Mapping[str, Any]], *, reference: bool = False) -> Kind:
    """Tell the kind of a student of several seeds; `MIXED` where its seeds were not made the same way.

    Args:
        several: Each seed's record of how it was made.
        reference: As for `kind_of`.
    """
    ways = {(kind_of(made, reference=reference), made.get("slice_ratio"), made.get("lr_factor", 1)) for made in several}
    return ways.pop()[0] if len(ways) == 1 else MIXED


def _kind_of_one(strategy: Mapping[str, Any]) -> Kind:
    name = strategy["name"]
    if name == "Finetune":
        return PLAIN if strategy.get("embedding_rows", "keep") == "keep" else ROWS
    if name == "Remos":
        return REMOS_LAYER if strategy.get("scope") == "layer" else REMOS
    if name == "Subspace":
        return SUBSPACE if strategy.get("ridge") is None else RIDGE
    if name == "Relevance":
        return GRADIENT if strategy.get("score") == "gradient" else ACTIVATION
    return _RULES.get(name) or Kind(name.lower(), name)
