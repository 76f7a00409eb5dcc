"""Strategies with the training that their papers and their published code ran them by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from remos_hf.strategies.base import Strategy
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from remos_hf.strategies.slice_and_reset import MagPrune


@dataclass(frozen=True)
class Phase:
    """Steps at one schedule.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At the first of them.
        schedule: "constant", "cosine" to 0, or "drop" to a tenth after 67 % of the steps.
    """

    steps: int
    learning_rate: float
    schedule: Literal["constant", "cosine", "drop"] = "constant"

    def rate(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0."""
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
        """Give the same in fewer or more steps: phases, and where and how often weights are averaged, in proportion."""
        scale = steps / self.steps
        ends = [round(scale * sum(one.steps for one in self.phases[: place + 1])) for place in range(len(self.phases))]
        starts = [0, *ends[:-1]]
        phases = tuple(
            replace(one, steps=max(1, end - start)) for one, start, end in zip(self.phases, starts, ends, strict=True)
        )
        strategy = self.strategy
        if isinstance(strategy, Renofeation):
            every = max(1, round(scale * strategy.average_every))
            strategy = replace(strategy, average_start=round(scale * strategy.average_start), average_every=every)
        return replace(self, strategy=strategy, phases=phases)


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
    }
)
