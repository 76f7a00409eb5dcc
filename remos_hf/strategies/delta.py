"""DELTA: fine-tuning whose features are held to the teacher's, the more the more a channel matters to the task."""

import logging
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from remos_hf.adapters.transformers_models import adapter_beside_head
from remos_hf.strategies.base import Hold, Strategy
from remos_hf.strategies.channel_weights import loss_by_gradient, loss_when_silenced, weights_of_channels
from remos_hf.strategies.distillation import HEAD_DECAYS, HeldFeatures, check_weights, last_weights, stage_modules
from remos_hf.strategies.feature_distance import DELTA_ATTENTION, DELTA_PLAIN, MEAN_SQUARES, FeatureDistance
from remos_hf.strategies.short_runs import Samples, check_counts, with_trained_head
from remos_hf.strategies.student_data import StudentData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta(Strategy):
    """Fine-tune with the student's features held to the teacher's, channel by channel, and the head's squares decayed.

    With attention: loss + weight * 1/2 sum over layers and samples of sum_c C a_c ||F_c - F'_c||^2 / positions +
    head_decay/2 ||head||^2, where a is a softmax of how much the loss grows when channel c of the teacher is silent,
    under a head trained on the frozen teacher. It keeps what the teacher knows, defects included.

    Uses poisoned data or an attack's success: no.

    Attributes:
        weight: Of the distance, at least 0; it means something only with `reduction`. `FeatureDistance` converts. The
            published .01 is for sums over a ResNet's features; over MiniLM's it drowned the task in 50 steps.
        head_decay: Weight of half the head's squares, at least 0.
        attention: "silenced" runs what follows a layer once for each of its channels (DELTA): seconds on a small net,
            many minutes on a transformer, whose channels are many. "gradient_x_activation" estimates the same to first
            order by one backward pass, and is not DELTA. "none" weighs all channels alike.
        reduction: "sum" adds up over samples and channels, as DELTA does; with attention it averages over positions,
            without it adds those up too. "mean" is that of all elements, as Renofeation and ReMoS have their "DELTA".
        at: "last_weights": what the last convolution of each stage gives, before norm, sum and activation (of
            transformers the last Linear of each block). "stages": what the stages give.
        samples: Labelled samples by which channels are weighed, over all processes.
        head_steps: Steps of 32 samples that the head of the weighed copy is trained before.
        layers: Modules whose outputs are compared; None finds them.
        head: Modules that are new; None finds them, but a plain module says nothing: name them, or () for none.
        seed: Of the samples; the run's if None.

    Source:
        Li et al., ICLR 2019, equation 5; train.py (att_fea_map, fea_map), channel_eval.py of lixingjian/DELTA.
        Differs: the head is trained 100 steps by AdamW, not 10 epochs by SGD; the samples are drawn at random, not the
        first four batches. A sum is over the batch of one process; `FeatureDistance` says what follows. Padding does
        not count.
    """

    citation: ClassVar[str] = (
        "@inproceedings{li2019delta, title={{DELTA}: Deep Learning Transfer using Feature Map with Attention for "
        "Convolutional Networks}, author={Li, Xingjian and Xiong, Haoyi and Wang, Hanchao and Rao, Yuxuan and Liu, "
        "Liping and Huan, Jun}, booktitle={ICLR}, year={2019}}"
    )
    needs_clean: ClassVar[bool] = True

    weight: float = 0.01
    head_decay: float = 0.01
    attention: Literal["silenced", "gradient_x_activation", "none"] = "silenced"
    reduction: Literal["sum", "mean"] = "sum"
    at: Literal["last_weights", "stages"] = "last_weights"
    samples: int = 256
    head_steps: int = 100
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run could use, before anything is loaded."""
        check_weights(self, "weight", "head_decay")
        check_counts(self, samples=1, head_steps=0)
        for name, known in (
            ("attention", ("silenced", "gradient_x_activation", "none")),
            ("reduction", ("sum", "mean")),
            ("at", ("last_weights", "stages")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, but got {getattr(self, name)!r}.")

    @property
    def refuses_computed_weights(self) -> str:
        """Why its decay of the head does nothing there."""
        return HEAD_DECAYS if self.head_decay else ""

    @property
    def distance(self) -> FeatureDistance:
        """How far apart features are."""
        if self.reduction == "mean":
            return MEAN_SQUARES
        return DELTA_PLAIN if self.attention == "none" else DELTA_ATTENTION

    def hold(self, student: nn.Module, teacher: nn.Module) -> Hold:
        """Hold the student's features to the teacher's.

        Raises:
            UnsupportedModelError: The model does not say what its head is, and `head` does not either.
        """
        return _Attended(self, teacher)


class _Attended(HeldFeatures):
    def __init__(self, recipe: Delta, teacher: nn.Module) -> None:
        adapter = adapter_beside_head(teacher, recipe.head)
        find = last_weights if recipe.at == "last_weights" else stage_modules
        modules = find(adapter, recipe.layers)
        super().__init__("delta", adapter, modules, recipe.distance, recipe.weight, head_decay=recipe.head_decay)
        self.recipe, self.weighed = recipe, {"attention": recipe.attention}

    def begin(self, student: nn.Module, data: StudentData) -> None:
        """Weigh the channels on the student's data."""
        recipe = self.recipe
        if recipe.attention == "none":
            return
        start = time.perf_counter()
        device = next(self.teacher.model.parameters()).device
        samples = Samples(data, device, recipe.seed or 0)
        asked, steps = with_trained_head(self.teacher.model, samples, steps=recipe.head_steps, head=recipe.head)
        weigh = loss_when_silenced if recipe.attention == "silenced" else loss_by_gradient
        found = weigh(asked, {name: asked.get_submodule(name) for name in self.layers}, samples, recipe.samples)
        self.channels = {name: weights_of_channels(one).to(device) for name, one in found.items()}
        seconds = time.perf_counter() - start
        self.weighed |= {
            "head_steps": steps,
            "seconds": round(seconds, 1),
            "channel_weights": {name: [float(one.min()), float(one.max())] for name, one in self.channels.items()},
        }
        logger.info("Weighed %d channels by %s in %.1f s.", sum(map(len, found.values())), recipe.attention, seconds)

    def details(self) -> dict[str, Any]:
        """Tell also how the channels were weighed."""
        return {"delta": {**super().details()["delta"], **self.weighed}}

    def state_dict(self) -> dict[str, Any]:
        """Give also how the channels were weighed."""
        return {**super().state_dict(), "weighed": self.weighed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        super().load_state_dict(state)
        self.weighed = state["weighed"]
