"""Strategies with the training that their papers and their published code ran them by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.base import Strategy
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.neft import Neft
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.slice_and_reset import MagPrune


@dataclass(frozen=True)
class Phase:
    """Steps at one schedule.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At the first of them; of "warm_up", after the last.
        schedule: "constant", "cosine" to 0, "drop" to a tenth after 67 % of the steps, or "warm_up" in a line from 0,
            which leaves the first step without effect.
    """

    steps: int
    learning_rate: float
    schedule: Literal["constant", "cosine", "drop", "warm_up"] = "constant"

    def rate(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0."""
        if self.schedule == "warm_up":
            return self.learning_rate * min(step / self.steps, 1.0)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return self.learning_rate * (0.1 if self.schedule == "drop" and step >= 0.67 * self.steps else 1.0)


@dataclass(frozen=True)
class Preset:
    """A strategy and the SGD that it was published with, as data; where the sources are silent, `differs` says so.

        args = TrainingArguments(output_dir=..., **preset.arguments())
        RemosTrainer(model, args, strategy=preset.strategy, optimizers=preset.optimizers(model), train_dataset=...)

    Attributes:
        strategy: The recipe.
        phases: Of the run, one after another; momentum is carried over.
        weight_decay: Of all parameters.
        source: Where the values stand.
        differs: In what it is not the other preset, or not what the source ran.
        momentum: Of SGD.
        batch_size: Samples of a step, on one device.
    """

    strategy: Strategy
    phases: tuple[Phase, ...]
    weight_decay: float
    source: str
    differs: str
    momentum: float = 0.0
    batch_size: int = 64

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def rate(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0; after the last phase, its last."""
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase.rate(step)
            step -= phase.steps
        return self.phases[-1].rate(step)

    def arguments(self) -> dict[str, Any]:
        """Give keywords of `transformers.TrainingArguments`: no clipping, and no schedule beside `optimizers`."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.phases[0].learning_rate,
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }

    def optimizer(self, model: nn.Module) -> SGD:
        """Build the optimizer of a model, as `fit` takes it."""
        rate = self.phases[0].learning_rate
        return SGD(model.parameters(), rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: Optimizer, steps: int | None = None) -> LambdaLR:
        """Build the schedule of all phases, as `fit` takes it; `steps` changes nothing."""
        return LambdaLR(optimizer, lambda step: self.rate(step) / self.phases[0].learning_rate)

    def optimizers(self, model: nn.Module) -> tuple[SGD, LambdaLR]:
        """Build both, as a Trainer takes them."""
        optimizer = self.optimizer(model)
        return optimizer, self.scheduler(optimizer)

    def within(self, steps: int) -> "Preset":
        """Give the same in fewer or more steps: phases, and what a strategy does by its steps, in proportion.

        Raises:
            ValueError: There are fewer steps than phases, of which each takes one at least.
        """
        if steps < len(self.phases):
            raise ValueError(f"A run of {len(self.phases)} phases takes as many steps at least, but got {steps}.")
        scale, done, end, phases = steps / self.steps, 0, 0, []
        for place, one in enumerate(self.phases, 1):
            done += one.steps
            start, end = end, min(max(end + 1, round(scale * done)), steps - len(self.phases) + place)
            phases.append(replace(one, steps=end - start))
        return replace(self, strategy=_in_proportion(self.strategy, scale, steps), phases=tuple(phases))


def _in_proportion(strategy: Strategy, scale: float, steps: int) -> Strategy:
    """Give a strategy whose own steps are so many times those it has; what begins within a run still does."""
    if isinstance(strategy, Renofeation):
        every = max(1, round(scale * strategy.average_every))
        return replace(
            strategy, average_start=min(round(scale * strategy.average_start), steps - 1), average_every=every
        )
    if isinstance(strategy, FeatureLwF):
        return replace(strategy, head_steps=min(round(scale * strategy.head_steps), steps - 1))
    return strategy


_REMOS = "ReMoS, ICSE 2022, section 5.2"
_SILENT = "The paper names no momentum, weight decay and batch size: those are the artifact's."
_FROM_SCRATCH = f"{_SILENT} Its rate 1e-1 is that of 'fix-before' methods, which we read as those from random weights."

_RENOFEATION = Preset(
    Renofeation(average_decay=None, average_start=90_000, average_every=500, norm_dropout=True, projector=True),
    (Phase(90_000, 1e-2, "cosine"), Phase(30_000, 5e-3)),
    5e-3,
    "Renofeation, CVPR Workshops 2021; enyac-group/Renofeation, scripts/Renofeation.sh",
    "The script starts an optimizer anew for the second phase; here momentum is carried over, at a rate of 0. CUB has "
    "distance=1.",
    momentum=0.9,
)

_CARTL = "CARTL, ICML 2021, its slides"
_CARTL_CODE = "NISP-official/CARTL, src/config.py, src/trainer/base_trainer.py"
# 100 epochs of 50,000 images in batches of 128, which are 391: one to warm up, and times .2 after the 40th, 70th, 90th.
_CARTL_RUN: dict[str, Any] = {
    "phases": (
        Phase(391, 1e-1, "warm_up"),
        Phase(39 * 391, 1e-1),
        Phase(30 * 391, 2e-2),
        Phase(20 * 391, 4e-3),
        Phase(10 * 391, 8e-4),
    ),
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "batch_size": 128,
}
_OF_CIFAR = "Steps are those of CIFAR's 50,000 images; k is 4, 6 or 8 there, of the 17 units of a WRN-34-10."
_CARTL_SILENT = f"The slides say nothing of SGD: its values are the artifact's. {_OF_CIFAR}"

# By strategy, then "paper" or "artifact".
PRESETS: Mapping[str, Mapping[str, Preset]] = MappingProxyType(
    {
        "finetune": {
            "paper": Preset(Finetune(), (Phase(30_000, 1e-2),), 1e-4, _REMOS, f"{_SILENT} Its rate there is 5e-3."),
            "artifact": Preset(
                Finetune(),
                (Phase(30_000, 5e-3),),
                1e-4,
                "ReMoS artifact, CV_adv/examples/nc_guided_defect.sh:41 and the logged runs of figure 8",
                "The paper says 1e-2. examples/finetune.sh has 1e-3, the head at ten times that, and dropout.",
            ),
        },
        "retrain": {
            "paper": Preset(Retrain(), (Phase(30_000, 1e-1),), 5e-3, _REMOS, _FROM_SCRATCH, momentum=0.9),
            "artifact": Preset(
                Retrain(),
                (Phase(30_000, 1e-2),),
                5e-3,
                "ReMoS artifact, the logged runs of figure 8; enyac-group/Renofeation, scripts/Re-training.sh",
                "The paper says 1e-1. Renofeation trains 90,000 steps. The logged runs also decay the head by 1e-2.",
                momentum=0.9,
            ),
        },
        "mag_prune": {
            "paper": Preset(
                MagPrune(0.2),
                (Phase(30_000, 1e-2),),
                1e-4,
                f"{_REMOS}: 80 % of the weights are pruned",
                f"{_SILENT} There it is 5e-3 for 10,000 steps.",
            ),
            "artifact": Preset(
                MagPrune(0.2),
                (Phase(10_000, 5e-3),),
                1e-4,
                "ReMoS artifact, CV_adv/examples/nc_guided_defect.sh:43",
                "Convolutions alone compete there; here every weight outside the head. CV_backdoor prunes half.",
            ),
        },
        "delta": {
            "paper": Preset(
                Delta(),
                (Phase(9_000, 1e-2, "drop"),),
                0.0,
                "DELTA, ICLR 2019; lixingjian/DELTA, train.py (weight .01, for Stanford Dogs .1)",
                "Sums over samples and channels with attention; ReMoS and Renofeation call a mean without it DELTA.",
                momentum=0.9,
            ),
            "artifact": Preset(
                Delta(0.5, attention="none", reduction="mean", at="stages"),
                (Phase(10_000, 1e-2),),
                1e-4,
                "ReMoS artifact, CV_adv/examples/nc_guided_defect.sh:42 and distillation_training.py:185-206",
                "The mean squared distance of four stages, without attention: DELTA's name, not its loss. "
                "Renofeation's scripts/DELTA.sh has weights .1 to 10 by data set for 30,000 steps.",
            ),
        },
        "delta_r": {
            "paper": Preset(DeltaR(), (Phase(30_000, 1e-1),), 5e-3, _REMOS, _FROM_SCRATCH, momentum=0.9),
            "artifact": Preset(
                DeltaR(),
                (Phase(10_000, 1e-2),),
                5e-3,
                "ziqi-zhang/Renofeation, backdoor/examples/baseline/delta-r.sh",
                "The ReMoS artifact ships no script of it; the paper says 30,000 steps.",
                momentum=0.9,
            ),
        },
        "renofeation": {
            "paper": _RENOFEATION,
            "artifact": replace(
                _RENOFEATION.within(30_000),
                strategy=replace(_RENOFEATION.within(30_000).strategy, average_every=500, projector=False),
                source="ReMoS artifact, CV_adv/distillation_training.py (raw features, averages of every 500th step)",
                differs="A quarter of the steps, and no projector. The artifact ships no script: its paper trains "
                "every method for 30,000 steps, which are shared out here as Renofeation's are.",
            ),
        },
        "feature_lwf": {
            "artifact": Preset(
                FeatureLwF(0.01, head_steps=25 * 391),
                (Phase(52 * 391, 1e-3),),
                2e-4,
                "NISP-official/CARTL, lwf_tl_trainer.py and scripts/lwf.sh (weights .1, .01, .005, .001)",
                "Their slides print an L2 distance, the code takes L1. Of 52 epochs 26 are named for the head, and 25 "
                "are trained so. Steps are those of CIFAR's 50,000 images, as its comment says (about 20,000); lwf.sh "
                "takes SVHN, of 573 batches an epoch.",
                momentum=0.9,
                batch_size=128,
            ),
        },
        "adversarial_training": {
            "paper": Preset(
                AdversarialTraining.paper(k=6),
                source=f"{_CARTL} (PGD-7, lambda .005 or .01); {_CARTL_CODE}",
                differs=f"{_CARTL_SILENT} The net starts from random weights there: put Retrain before it.",
                **_CARTL_RUN,
            ),
            "artifact": Preset(
                AdversarialTraining.artifact(k=6),
                source=f"{_CARTL_CODE}, exps/fdm_l2.py, robust_plus_singular_regularization_trainer.py",
                differs="The distance is a sum over the batch of 128, so it counts 128 times as much as the printed "
                f"mean. {_OF_CIFAR} The net starts from random weights there, and what is kept is the epoch of the "
                "best robust accuracy in training; here it is the last.",
                **_CARTL_RUN,
            ),
        },
        "neft": {
            "paper": Preset(
                Neft(k=6, extractor_statistics="reuse", submodel_affine="freeze"),
                source=f"{_CARTL} (beta .4, and the policy of norms that kept most robustness); {_CARTL_CODE}",
                differs=f"{_CARTL_SILENT} They name neither the mix nor the head's start, which the code has.",
                **_CARTL_RUN,
            ),
            "artifact": Preset(
                Neft.artifact(k=6, extractor_statistics="update"),
                source=f"{_CARTL_CODE}, scripts/pwrn34_neft_sn_norm.sh, src/networks/parseval_wrn.py",
                differs="Blocks mix, the head starts from U[0, 1), and the extractor's statistics are updated: the "
                f"script freezes weight and bias of norms alone, the slides' best reuses both. {_OF_CIFAR}",
                **_CARTL_RUN,
            ),
        },
    }
)
