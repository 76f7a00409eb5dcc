"""Slicing for anyone's Trainer: `attach_remos` before `train()`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.training.moments import Moments, hold_trainer
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.reporting import StartLog
from remos_hf.training.start import chosen_start, start_run


def attach_remos(
    trainer: Trainer,
    *,
    slice_ratio: float | Literal["auto"] | None = None,
    strategy: Strategy | Sequence[Strategy] | None = None,
    accuracy_budget: float | None = None,
    ratio_search: RatioSearch | None = None,
    resume_from_checkpoint: str | Path | None = None,
) -> Sidecars:
    """Start the student of any Trainer (SFTTrainer, Seq2SeqTrainer): slice its model now, once, before `train()`.

    When training starts, what was done is logged through the trainer's own reporters (see `StartLog`).

    Args:
        trainer: The trainer, with its model and training data.
        slice_ratio: Share of the weights to keep, by ReMoS. "auto" tries ratios now, as RemosTrainer does.
        strategy: Any other strategy, or a list of them. Beside "auto", the one whose ratio is searched.
        accuracy_budget: Only with "auto": accuracy that slicing may cost, as a share; 0.02 if None.
        ratio_search: Only with "auto": the whole search, its budget included.
        resume_from_checkpoint: The checkpoint that `train()` will resume from: its slice is taken, nothing is chosen.

    Returns:
        What was done. The same is written beside every checkpoint, and into `output_dir` when training ends.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`, or a search that cannot be made (see RemosTrainer).
        RemosError: No ratio stays within the budget, or the checkpoint was made another way.
    """
    strategy, search = chosen_start(slice_ratio, strategy, accuracy_budget, ratio_search)
    moments = start_run(trainer, strategy, search, resume_from_checkpoint)
    hold_trainer(trainer, moments)
    trainer.add_callback(RemosCallback(moments))
    trainer.add_callback(StartLog(trainer, moments.sidecars))
    return moments.sidecars


class RemosCallback(TrainerCallback):
    """Writes the sidecars, and what holds the student, beside every checkpoint.

    Args:
        moments: Those of the run.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments, self.sidecars = moments, moments.sidecars

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the sidecars beside a checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.moments.save(folder)
        if args.should_save:
            self.sidecars.save(folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write the sidecars where the trained student will be saved."""
        if args.should_save:
            self.sidecars.save(args.output_dir)
