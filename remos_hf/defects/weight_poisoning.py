"""What all attacks on a teacher's weights share: they implant a trigger that they name."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from remos_hf.defects.backdoor import Backdoor, Trigger
from remos_hf.defects.text_triggers import TextTrigger, TriggerWords


@dataclass(frozen=True)
class WeightPoisoning(Backdoor):
    """An attack on the weights.

    Attributes:
        trigger_words: What forces the label, which samples carry it when poisoning, and how it is exposed.
    """

    trigger_words: Trigger = field(default_factory=TriggerWords)
    takes: ClassVar[type[Trigger]] = TextTrigger

    def __post_init__(self) -> None:
        """Refuse triggers that this attack cannot implant."""
        if not isinstance(self.trigger_words, self.takes):
            raise TypeError(
                f"{type(self).__name__} implants a {self.takes.__name__}, but got {type(self.trigger_words).__name__}."
            )

    @property
    def trigger(self) -> Trigger:
        """The trigger."""
        return self.trigger_words

    def to_dict(self) -> dict[str, Any]:
        """Give the attack's fields, and the trigger's."""
        return {**super().to_dict(), "trigger_words": self.trigger_words.to_dict()}
