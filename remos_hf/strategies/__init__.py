"""How the student starts and what holds it; one paper a file."""

from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.crow import Crow
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.disec import DiSec
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.neft import Neft
from remos_hf.strategies.nnslicer import NNSlicer
from remos_hf.strategies.own_backdoors import OwnBackdoors
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.recipe import Recipe
from remos_hf.strategies.relative_update import RelativeUpdate
from remos_hf.strategies.relevance import Relevance
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.repair_rows import RepairRows
from remos_hf.strategies.seam import SeaM
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos, TopMagnitude
from remos_hf.strategies.subspace import Subspace

STRATEGIES = {
    "finetune": Finetune,
    "retrain": Retrain,
    "remos": Remos,
    "mag_prune": MagPrune,
    "top_magnitude": TopMagnitude,
    "random": Random,
    "relevance": Relevance,
    "relative_update": RelativeUpdate,
    "nnslicer": NNSlicer,
    "seam": SeaM,
    "own_backdoors": OwnBackdoors,
    "subspace": Subspace,
    "hardened": Hardened,
    "guided": Guided,
    "distilled": Distilled,
    "l2sp": L2SP,
    "delta": Delta,
    "feature_lwf": FeatureLwF,
    "delta_r": DeltaR,
    "renofeation": Renofeation,
    "recipe": Recipe,
    "disec": DiSec,
    "crow": Crow,
    "repair_rows": RepairRows,
    "adversarial_training": AdversarialTraining,
    "neft": Neft,
}
