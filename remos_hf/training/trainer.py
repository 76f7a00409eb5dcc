"""RemosTrainer: transformers.Trainer that starts its student by a strategy."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.coverage.profile import CoverageProfile
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.base import Strategy
from remos_hf.training.callbacks import RemosCallback, chosen_strategy, resumed_sidecars, start_student, student_batches

if TYPE_CHECKING:
    from peft import PeftConfig


class RemosTrainer(Trainer):
    """A Trainer whose student gives up the part of the teacher that its task does not need, before it trains.

    Everything that Trainer does, it does: arguments, evaluation, checkpoints, DDP. A resumed run never slices again.
    Beside the saved student, which stays an ordinary checkpoint, lie `remos_config.json`, `remos_coverage.safetensors`
    and `remos_slice.safetensors`.

    Args:
        model: The student: the teacher's weights with a new head. It is sliced in place when training starts.
        args: Trainer's arguments.
        slice_ratio: Share of the teacher's weights that ReMoS keeps, in (0, 1].
        strategy: Any other strategy; give one of the two.
        profile_dataset: The samples that decide the coverage, if they are not to be read as `train_dataset` is: without
            its augmentation, or another share of the task's data.
        peft_config: Add adapters after slicing (LoRA, ...). `save_model` writes the merged student, since the adapters
            alone would be loaded onto the unsliced teacher; checkpoints hold the adapters.
        **trainer_arguments: Passed on to Trainer.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`; a ratio outside (0, 1]; `model_init`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        slice_ratio: float | None = None,
        strategy: Strategy | None = None,
        profile_dataset: Dataset | IterableDataset | None = None,
        peft_config: "PeftConfig | None" = None,
        **trainer_arguments: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        self.strategy = chosen_strategy(slice_ratio, strategy)
        if trainer_arguments.get("model_init") is not None or model is None:
            raise ValueError(
                "RemosTrainer needs model=, the teacher with its new head: what is kept depends on its weights. With "
                "model_init every train() would start from another model; make one RemosTrainer for each instead."
            )
        adapter_for(model, ())  # refuse wrapped models now, not after the data is loaded
        self.peft_config, self.profile_dataset = peft_config, profile_dataset
        self.sidecars: Sidecars | None = None
        super().__init__(model, args, **trainer_arguments)
        # With it, Trainer neither divides the loss by the accumulation steps nor by the processes, while classification
        # heads and our own loss ignore the count they are given: updates would grow with both (transformers #47688).
        self.model_accepts_loss_kwargs = False

    @property
    def profile(self) -> CoverageProfile | None:
        """The coverage that decided the slice; None before training, or if the strategy needs none."""
        return self.sidecars and self.sidecars.profile

    @property
    def relevant_slice(self) -> RelevantSlice | None:
        """The weights kept; None before training, or if the strategy slices nothing."""
        return self.sidecars and self.sidecars.relevant_slice

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,  # noqa: ANN401 - Trainer's own
        **kwargs: Any,  # noqa: ANN401
    ) -> TrainOutput:
        """Start the student by the strategy, once, and train it.

        Args:
            resume_from_checkpoint: As in Trainer. Then the slice is read from the checkpoint and nothing is chosen.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            RemosError: The checkpoint was made by another strategy.
            FileNotFoundError: The checkpoint was not made by RemosTrainer.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if self.sidecars is None:
            self._start(checkpoint)
        output = super().train(checkpoint, *args, **kwargs)
        self.strategy.finish(self.model, lambda samples: student_batches(self, samples))
        return output

    def _checkpoint(self, resume: str | bool | None) -> str | None:
        if resume is not True:
            return resume or None
        found = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        if found is None:
            raise ValueError(f"There is no checkpoint to resume from in {self.args.output_dir}.")
        return found

    def _start(self, checkpoint: str | None) -> None:
        # Here, not in a callback: on_train_begin runs when a checkpoint's weights are loaded and the optimizer is
        # built, so that a reset there overwrites what was learned.
        self.sidecars = (
            start_student(self, self.strategy) if checkpoint is None else resumed_sidecars(checkpoint, self.strategy)
        )
        self.add_callback(RemosCallback(self.strategy))
        if self.peft_config is None:
            return
        if checkpoint is not None:
            self._start_base_again()
        from peft import get_peft_model

        self.model = self.model_wrapped = get_peft_model(self.model, self.peft_config)

    def _start_base_again(self) -> None:
        # A checkpoint of adapters holds no base weights.
        self.strategy.restart(self.model, lambda samples: student_batches(self, samples), self.relevant_slice)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,  # noqa: ANN401 - whatever later versions pass
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute Trainer's loss; in training steps of strategies that act in it, with their inputs and penalty."""
        if not (model.training and self.strategy.acts_in_loss):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        inputs = self.strategy.before_forward(model, inputs)
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch=num_items_in_batch, **kwargs)
        penalty = self.strategy.penalty(model, inputs, outputs)
        loss = loss if penalty is None else loss + penalty
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as an ordinary checkpoint, with the sidecars beside it.

        Args:
            output_dir: Where to; `args.output_dir` if None.
            _internal_call: As in Trainer.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.peft_config is None or self.sidecars is None or folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super().save_model(output_dir, _internal_call)
        else:
            self._save_merged(output_dir, _internal_call)
        if self.sidecars is not None and self.args.should_save:
            # Pushing while training uploads the output folder with the checkpoint's weights copied into it.
            for place in {folder, Path(self.args.output_dir)} if self.args.push_to_hub else {folder}:
                self.sidecars.save(place)

    def _save_merged(self, output_dir: str | None, _internal_call: bool) -> None:
        adapted = self.model
        self.model = copy.deepcopy(self.accelerator.unwrap_model(adapted)).merge_and_unload()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = adapted
