"""Slicing for anyone's Trainer: `attach_remos` before `train()`."""

from pathlib import Path
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.reporting import StartLog
from remos_hf.training.start import chosen_start, resumed_sidecars, searched_start, start_student


def attach_remos(
    trainer: Trainer,
    *,
    slice_ratio: float | Literal["auto"] | None = None,
    strategy: Strategy | None = None,
    accuracy_budget: float | None = None,
    ratio_search: RatioSearch | None = None,
    resume_from_checkpoint: str | Path | None = None,
) -> Sidecars:
    """Start the student of any Trainer (SFTTrainer, Seq2SeqTrainer): slice its model now, once, before `train()`.

    When training starts, what was done is logged through the trainer's own reporters (see `StartLog`).

    Args:
        trainer: The trainer, with its model and training data.
        slice_ratio: Share of the weights to keep, by ReMoS. "auto" tries ratios now, as RemosTrainer does.
        strategy: Any other strategy that does not act in the loss. Beside "auto", the one whose ratio is searched.
        accuracy_budget: Only with "auto": accuracy that slicing may cost, as a share; 0.02 if None.
        ratio_search: Only with "auto": the whole search, its budget included.
        resume_from_checkpoint: The checkpoint that `train()` will resume from: its slice is taken, nothing is chosen.

    Returns:
        What was done. The same is written beside every checkpoint, and into `output_dir` when training ends.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`, a strategy that acts in the loss, or a search that
            cannot be made (see RemosTrainer).
        RemosError: No ratio stays within the budget, or the checkpoint was made another way.
    """
    strategy, search = chosen_start(slice_ratio, strategy, accuracy_budget, ratio_search)
    if strategy.acts_in_loss:
        raise ValueError(
            f"{type(strategy).__name__} acts in the loss, which only RemosTrainer lets it do. Use RemosTrainer."
        )
    if search is not None:
        strategy, sidecars = searched_start(trainer, strategy, search, resume_from_checkpoint)
    elif resume_from_checkpoint is None:
        sidecars = start_student(trainer, strategy)
    else:
        sidecars = resumed_sidecars(resume_from_checkpoint, strategy)
    trainer.add_callback(RemosCallback(strategy, sidecars))
    trainer.add_callback(StartLog(trainer, sidecars))
    return sidecars


class RemosCallback(TrainerCallback):
    """Acts after each step as the strategy wants, and writes the sidecars beside every checkpoint.

    Args:
        strategy: The strategy.
        sidecars: What to write; None if the trainer writes it itself.
    """

    def __init__(self, strategy: Strategy, sidecars: Sidecars | None = None) -> None:
        self.strategy, self.sidecars = strategy, sidecars

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        """Let the strategy act after an optimizer step."""
        self.strategy.after_step(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the sidecars beside a checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.sidecars is not None and args.should_save and folder.is_dir():
            self.sidecars.save(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write the sidecars where the trained student will be saved."""
        if self.sidecars is not None and args.should_save:
            self.sidecars.save(args.output_dir)
