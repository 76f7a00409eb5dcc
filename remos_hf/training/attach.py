"""Slicing for anyone's Trainer: `attach_remos` before `train()`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import is_peft_model
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.training.effect_search import EffectSearch
from remos_hf.training.half_written import chosen_checkpoint
from remos_hf.training.lora import base_of
from remos_hf.training.moments import check_adapters, hold_trainer
from remos_hf.training.profiling_data import samples_to_look_at
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.recorded import RecordedTrainer, check_pushing, record_adapters
from remos_hf.training.reporting import StartLog
from remos_hf.training.start import chosen_start, start_run

logger = logging.getLogger(__name__)


def attach_remos(
    trainer: Trainer,
    *,
    slice_ratio: float | Literal["auto"] | None = None,
    strategy: Strategy | Sequence[Strategy] | None = None,
    accuracy_budget: float | None = None,
    ratio_search: RatioSearch | EffectSearch | None = None,
    max_samples: int | Literal["all"] | None = None,
    profile_dataset: Dataset | IterableDataset | None = None,
    resume_from_checkpoint: str | Path | bool | None = None,
) -> Sidecars:
    """Start the student of any Trainer (SFTTrainer, DPOTrainer, Seq2SeqTrainer): slice its model now, before `train()`.

    From then on the trainer is RemosTrainer's equal: every checkpoint and every `save_model` has the record beside it,
    `push_to_hub` and `create_model_card` are ours (see `RemosTrainer`), what holds the student acts in the loss, and
    when training starts, what was done is logged through the trainer's own reporters (see `StartLog`).

    The data is read as the trainer trains on it, unshuffled. Each sequence is a sample: both answers of a preference
    pair (DPOTrainer, RewardTrainer), each text of a packed or padding-free row; the rows of packing_strategy="wrapped",
    which say nothing of their texts, are samples themselves.

    Where the trainer has put fresh LoRA adapters on already (SFTTrainer(peft_config=...)), the base under them is
    sliced, and the record's names are those of the base. `save_model` then writes the merged student, and its log says
    so: the adapters alone, which checkpoints hold, would be loaded onto the unsliced teacher. The reference of a
    DPOTrainer is the unsliced teacher, or with adapters, as ever, its own base, which is sliced now.

    Args:
        trainer: The trainer, with its model and training data, before it trains.
        slice_ratio: Share of the weights to keep, by ReMoS. "auto" tries ratios now, as RemosTrainer does.
        strategy: Any other strategy, or a list of them. Beside "auto", the one whose ratio is searched.
        accuracy_budget: Only with "auto": accuracy that slicing may cost, as a share; 0.02 if None.
        ratio_search: Only with "auto": the whole search, its budget included; a `RatioSearch` or an `EffectSearch`.
        max_samples: As in `RemosTrainer`; rows of the trainer's data, so that a packed row or a pair counts once.
        profile_dataset: The rows that decide the coverage, prepared as `trainer.train_dataset` is, if not that.
        resume_from_checkpoint: The checkpoint that `train()` will resume from: its slice is taken, nothing is chosen.
            True takes the last whole one, as `RemosTrainer.train` does.

    Returns:
        What was done. The same is in `trainer.sidecars`, and in `output_dir` when training has ended.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`; a trainer that has a student already, has trained,
            or makes its own model (`model_init`); a strategy that would overwrite its best checkpoint; data that its
            model cannot be run on (GRPOTrainer makes its own); or a search that cannot be made (see RemosTrainer).
        UnsupportedModelError: The model carries adapters that are not fresh LoRA.
        RemosError: No ratio stays within the budget, or the checkpoint was made another way.
    """
    strategy, search = chosen_start(slice_ratio, strategy, accuracy_budget, ratio_search)
    _check_attachable(trainer)
    samples_to_look_at(max_samples)
    adapted = is_peft_model(trainer.model)
    if adapted:
        check_adapters(strategy)
    if adapted and search is not None:
        raise ValueError(
            "slice_ratio='auto' trains copies of the model at several ratios, but this trainer has put adapters on "
            "already. Give a number, or use RemosTrainer(slice_ratio='auto', peft_config=...)."
        )
    checkpoint = chosen_checkpoint(resume_from_checkpoint, trainer.args.output_dir)
    trainer.max_samples, trainer.profile_dataset = max_samples, profile_dataset
    model = trainer.model
    if getattr(trainer.args, "packing", False) and getattr(trainer.args, "packing_strategy", "") == "wrapped":
        logger.warning(
            "packing_strategy='wrapped' cuts texts across rows and keeps no trace of where, so each row counts as one "
            "sample."
        )
    with base_of(model) as base:
        trainer.model = base
        try:
            moments = start_run(trainer, strategy, search, checkpoint)
        finally:
            trainer.model = model
        if adapted and checkpoint is not None:
            moments.restart(base)
    trainer.__class__ = type(type(trainer).__name__, (_AttachedTrainer, type(trainer)), {"__module__": __name__})
    trainer.moments, trainer.resumes_from = moments, checkpoint
    if adapted:
        record_adapters(moments.sidecars, model)
    hold_trainer(trainer, moments)
    trainer.add_callback(StartLog(trainer, moments.sidecars))
    return moments.sidecars


class _AttachedTrainer(RecordedTrainer):
    """What stands before the class of a trainer that was attached."""

    resumes_from: str | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,  # noqa: ANN401 - Trainer's own
        **kwargs: Any,  # noqa: ANN401
    ) -> TrainOutput:
        """Train the student as the trainer's class does, from where `attach_remos` was told."""
        checkpoint = chosen_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if not self._is_of_this_student(checkpoint):
            raise ValueError(
                f"train(resume_from_checkpoint={resume_from_checkpoint!r}) would go on with another student than "
                f"the one that attach_remos(resume_from_checkpoint={self.resumes_from!r}) started. Make a new trainer "
                "and give the checkpoint to both."
            )
        output = super().train(checkpoint, *args, **kwargs)
        self.resumes_from = None
        if self.args.should_save:
            self.sidecars.save(self.args.output_dir)
        return output

    def _is_of_this_student(self, checkpoint: str | None) -> bool:
        known = self.resumes_from
        if checkpoint is None or known is None:
            same = checkpoint is known
        else:
            same = Path(checkpoint).resolve() == Path(known).resolve()
        if same or checkpoint is None:
            return same
        # One that this very run wrote is as good, unless something held the student, and has moved on since.
        written = Sidecars.load(checkpoint)
        alike = written.config["strategy"] == json.loads(json.dumps(self.moments.strategy.to_dict()))
        return self.moments.hold is None and alike and written.relevant_slice == self.relevant_slice


def _check_attachable(trainer: Trainer) -> None:
    if isinstance(trainer, RecordedTrainer):
        raise ValueError(
            f"This {type(trainer).__name__} has a student already: a second start would reset what the first one kept. "
            "Make a new trainer; several strategies go in one call, as a list."
        )
    if trainer.state.global_step > 0:
        raise ValueError(
            f"This {type(trainer).__name__} has trained for {trainer.state.global_step} steps, which slicing now would "
            "undo. Attach before train(); to slice what it has trained, give the model to a new trainer."
        )
    if getattr(trainer, "model_init", None) is not None:
        raise ValueError(
            f"This {type(trainer).__name__} makes its model in train() (model_init), after attach_remos has sliced the "
            "one that it has now. Give it model= instead."
        )
    check_pushing(trainer.args)
    if trainer.args.push_to_hub and trainer.args.hub_private_repo is None and trainer.is_world_process_zero():
        logger.warning(
            "%s made the repository %s before attach_remos could make it private: look whether it is public. "
            "TrainingArguments(hub_private_repo=True) makes it private.",
            type(trainer).__name__,
            trainer.hub_model_id,
        )
