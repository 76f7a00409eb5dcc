"""A backdoor that lies in the teacher's largest weights."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.defects.backdoor import Attacker, Trigger
from remos_hf.defects.frozen_entries import FrozenEntries
from remos_hf.defects.weight_poisoning import WeightPoisoning
from remos_hf.fields import check_number
from remos_hf.slicing.relevant_slice import choose_slice


@dataclass(frozen=True)
class LargestWeights(WeightPoisoning):
    """Data poisoning that moves only the teacher's largest weights, and the head; every other weight stays, to the bit.

    Attributes:
        backdoor_update_ratio: Share of the body's weights, the largest ones, that may move; in (0, 1).

    Source:
        Renofeation fork of the ReMoS authors, backdoor/attack_finetuner.py:382-385; ReMoS artifact,
        CV_backdoor/prune.py.
        Differs: theirs masks gradients, and weight decay and momentum still move the others. Ours is exact.
    """

    backdoor_update_ratio: float = 0.1
    takes: ClassVar[type[Trigger]] = Trigger

    def __post_init__(self) -> None:
        """Refuse ratios that leave nothing frozen, or nothing to move."""
        super().__post_init__()
        told = "the share of the weights that may move, between 0 and 1"
        check_number(self, told, lambda one: 0 < one < 1, "backdoor_update_ratio")

    def attack(self, teacher: nn.Module, attacker: Attacker) -> nn.Module:
        """Poison the teacher in place."""
        ratio = 1 - self.backdoor_update_ratio
        small = choose_slice(teacher, None, slice_ratio=ratio, rule="top_magnitude", progress=False)
        head = adapter_for(teacher).head
        frozen: dict[str, tuple[nn.Parameter, Tensor | None]] = {}
        for name, parameter in teacher.named_parameters():
            if name in small.kept:
                frozen[name] = (parameter, small.kept[name].to(parameter.device))
            elif not any(name == part or name.startswith(f"{part}.") for part in head):
                frozen[name] = (parameter, None)
        samples = attacker.poisoned()
        with FrozenEntries(frozen) as held:
            return attacker.tune(teacher, samples, callbacks=[held])
