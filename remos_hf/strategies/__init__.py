"""How the student starts and what holds it; one paper a file."""

from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.hardened import Hardened
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.renofeation import Renofeation
from remos_hf.strategies.slice_and_reset import MagPrune, Random, Remos, TopMagnitude

STRATEGIES = {
    "finetune": Finetune,
    "retrain": Retrain,
    "remos": Remos,
    "mag_prune": MagPrune,
    "top_magnitude": TopMagnitude,
    "random": Random,
    "l2sp": L2SP,
    "renofeation": Renofeation,
    "distilled": Distilled,
    "hardened": Hardened,
    "guided": Guided,
}
