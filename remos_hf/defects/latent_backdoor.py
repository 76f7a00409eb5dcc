"""A backdoor in a teacher's features, which a new head inherits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback

from remos_hf.activations import evaluating, watch
from remos_hf.adapters.classified import logits_in
from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.feature_attack import feature_layer
from remos_hf.defects.image_samples import PreparedImages
from remos_hf.defects.image_triggers import ImageAttacker, ImageTrigger
from remos_hf.defects.picture_triggers import PatchTrigger
from remos_hf.defects.samples import resolved_label
from remos_hf.fields import check_number


@dataclass(frozen=True)
class LatentBackdoor(Backdoor):
    """A backdoor in the teacher's features: those of triggered inputs are pulled to those of the target class.

    It survives a new head: whatever a student learns to call the target class, triggered inputs look like it. The
    teacher is fine-tuned on clean data first. Then the loss is the cross-entropy on clean inputs, plus `weight` times
    the mean squared difference between each triggered input's penultimate feature and the mean feature of the target
    class. The mean is taken anew at the start of each epoch, over all clean samples of the class, in eval mode.

    Attributes:
        image_trigger: The trigger, the target label, and which samples are shown with the trigger as well; all of them
            in the original, so its `poison_rate` is 1 by default.
        weight: Weight of the features' distance.
        layer: Dotted name of the module whose input is the feature; None for the head's last layer.

    Source:
        Yao et al. 2019, "Latent Backdoor Attacks on Deep Neural Networks" (CCS).
        Differs: the trigger is given, not optimised on the teacher. The target class stays in the teacher's head, which
        a student drops anyway. The ReMoS artifact cites the attack and does not have it.
    """

    citation: ClassVar[str] = (
        "@inproceedings{yao2019latent, title={Latent Backdoor Attacks on Deep Neural Networks}, author={Yao, Yuanshun "
        "and Li, Huiying and Zheng, Haitao and Zhao, Ben Y.}, booktitle={CCS}, year={2019}}"
    )

    image_trigger: ImageTrigger = field(default_factory=lambda: PatchTrigger(poison_rate=1.0))
    weight: float = 10.0
    layer: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that pull nothing."""
        if not isinstance(self.image_trigger, ImageTrigger):
            raise TypeError(f"image_trigger is a PatchTrigger or a BlendedTrigger, but got {self.image_trigger!r}.")
        check_number(self, "the weight of the features' distance, above 0", lambda one: one > 0, "weight")

    @property
    def trigger(self) -> ImageTrigger:
        """The trigger."""
        return self.image_trigger

    def to_dict(self) -> dict[str, Any]:
        """Give the attack's fields, and the trigger's."""
        return {**super().to_dict(), "image_trigger": self.image_trigger.to_dict()}

    def attack(self, teacher: nn.Module, attacker: ImageAttacker) -> nn.Module:
        """Fine-tune the teacher on the clean data, or take it fine-tuned, then pull the features, in place.

        Both trainings take the arguments, so without `finetuned` the teacher is trained twice as long.

        Raises:
            ValueError: No sample, or every sample, has the target label, or the teacher has no such layer.
        """
        trigger, clean = self.trigger, attacker.clean()
        target = resolved_label(trigger.target_label, attacker.dataset, trigger.label_column)
        of_target = [row for row, label in enumerate(clean.labels) if label == target]
        if not 0 < len(of_target) < len(clean.labels):
            raise ValueError(
                f"A latent backdoor needs clean samples of the target label {target} and of others, but "
                f"{len(of_target)} of {len(clean.labels)} samples have it."
            )
        _, layer = feature_layer(teacher, self.layer)
        attacker.tune_clean(teacher)
        # Their mean is of what the model is evaluated on.
        targets = Subset(replace(attacker, augment=None).clean(), of_target)
        return attacker.tune(
            teacher,
            _Pairs(clean, trigger, trigger.poisoned_rows(attacker.dataset)),
            trainer_class=partial(_LatentTrainer, layer=layer, weight=self.weight, targets=targets),
            data_collator=_collate_pairs,
        )


class _Pairs(torch.utils.data.Dataset):
    """Clean samples; those that are chosen come with a second image, the same crop with the trigger."""

    def __init__(self, clean: PreparedImages, trigger: ImageTrigger, chosen: frozenset[int]) -> None:
        self.clean, self.trigger, self.chosen = clean, trigger, chosen

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.clean.pixels(index)
        item = {"pixel_values": self.clean.normalised(pixels), "labels": self.clean.labels[index]}
        if index in self.chosen:
            triggered = self.trigger.stamped(pixels, self.clean.key(index))
            item["triggered"] = self.clean.normalised(triggered)
        return item


def _collate_pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    triggered = [row["triggered"] for row in rows if "triggered" in row]
    return {
        "pixel_values": pixels,
        "labels": torch.tensor([row["labels"] for row in rows]),
        "triggered": torch.stack(triggered) if triggered else pixels[:0],
    }


class _LatentTrainer(Trainer):
    """Adds the distance of triggered inputs' features from the target class's mean feature."""

    def __init__(
        self,
        *,
        layer: nn.Module,
        weight: float,
        targets: torch.utils.data.Dataset,
        **options: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        super().__init__(**options)
        self._layer, self._weight, self._targets = layer, weight, targets
        self._mean: Tensor | None = None
        self.add_callback(_EachEpoch(self.take_mean))

    @torch.no_grad()
    def take_mean(self, model: nn.Module) -> None:
        """Take the mean feature of the target class, with the weights as they are now."""
        total, count = 0.0, 0
        with evaluating(model):
            for batch in DataLoader(self._targets, batch_size=self.args.train_batch_size):
                with self.compute_loss_context_manager():
                    features, _ = _features_and_logits(model, self._layer, batch["pixel_values"].to(self.args.device))
                total, count = total + features.float().sum(0), count + len(features)
        self._mean = total / count

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool = False, **_: object
    ) -> Tensor | tuple[Tensor, Any]:
        """Run clean and triggered inputs as one batch: norm layers see both, as they will when the teacher is used."""
        labels, triggered = inputs["labels"], inputs["triggered"]
        together = torch.cat([inputs["pixel_values"], triggered])
        features, logits = _features_and_logits(model, self._layer, together)
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(logits[: len(labels)].float(), labels, label_smoothing=smoothing)
        if len(triggered):
            pulled = features[len(labels) :].float()
            loss = loss + self._weight * F.mse_loss(pulled, self._mean.expand_as(pulled))
        return (loss, {"logits": logits[: len(labels)]}) if return_outputs else loss


class _EachEpoch(TrainerCallback):
    def __init__(self, act: Callable[[nn.Module], None]) -> None:
        self._act = act

    def on_epoch_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        self._act(model)


def _features_and_logits(model: nn.Module, layer: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    given: dict[str, Tensor] = {}
    with watch({"feature": layer}, lambda name, into, _: given.update({name: into})):
        logits = logits_in(model(pixel_values=pixel_values), model)
    if "feature" not in given:
        raise ValueError(f"The layer whose input is the feature, {layer}, did not run. Name another one with layer=.")
    return given["feature"], logits
