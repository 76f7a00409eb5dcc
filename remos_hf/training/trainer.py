"""RemosTrainer: transformers.Trainer that starts its student by a strategy."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.base import Strategy
from remos_hf.training.effect_search import EffectSearch
from remos_hf.training.half_written import chosen_checkpoint
from remos_hf.training.loss_scale import settle_loss_scale
from remos_hf.training.moments import check_adapters, hold_trainer
from remos_hf.training.profiling_data import samples_to_look_at
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.recorded import RecordedTrainer, check_pushing, record_adapters
from remos_hf.training.reporting import StartLog
from remos_hf.training.start import chosen_start, start_run

if TYPE_CHECKING:
    from peft import PeftConfig


class RemosTrainer(RecordedTrainer):
    """A Trainer whose student gives up the part of the teacher that its task does not need, before it trains.

    Everything that Trainer does, it does: arguments, evaluation, checkpoints, DDP. A resumed run never slices again.
    Beside the saved student, which stays an ordinary checkpoint, lie `remos_config.json`, `remos_coverage.safetensors`
    and `remos_slice.safetensors`. When training starts, coverage and slice are logged through Trainer's reporters,
    under the names that `StartLog` lists; `log_defects` adds what was inherited.

    With `slice_ratio="auto"`, `train()` first fine-tunes copies of the model at several ratios, each for half the
    planned steps, and one plainly, and starts the student at the smallest ratio whose accuracy on `eval_dataset` stays
    within `accuracy_budget` of plain fine-tuning's. That data must be clean and held out, and should not be what the
    student is reported on. If no ratio does, it raises instead of slicing nothing. The curve of the search is logged,
    and lies in `remos_config.json` under `ratio_search`. Needs memory for a second model with its optimizer.

    Args:
        model: The student: the teacher's weights with a new head. It is sliced in place when training starts.
        args: Trainer's arguments.
        slice_ratio: Share of the teacher's weights that ReMoS keeps, in (0, 1], or "auto".
        strategy: Any other strategy; give one of the two. Beside "auto", the strategy that slices whose ratio is
            searched; the ratio it has is replaced.
        accuracy_budget: Only with "auto": accuracy that slicing may cost, as a share in (0, 1); 0.02 if None.
        ratio_search: Only with "auto": the whole search (ratios, length of the trials, metric, budget). An
            `EffectSearch` instead takes the mildest ratio, energy (`strategy=Subspace(energy="auto")`) or k that loses
            triggers of our own; the record has its curve under `effect_search`.
        profile_dataset: The samples that decide the coverage, if they are not to be read as `train_dataset` is: without
            its augmentation, or another share of the task's data.
        max_samples: Samples of it that decide, drawn by the seed (of a stream the first ones), for strategies that name
            no number. None takes `profiling.data_pass.DEFAULT_MAX_SAMPLES`, "all" all, also of a stream.
        peft_config: Add adapters after slicing (LoRA, ...). `save_model` writes the merged student, since the adapters
            alone would be loaded onto the unsliced teacher; checkpoints hold the adapters.
        **trainer_arguments: Passed on to Trainer.

    Raises:
        ValueError: Neither or both of `slice_ratio` and `strategy`; a ratio or a budget out of range; settings of a
            search without "auto"; `model_init`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        slice_ratio: float | Literal["auto"] | None = None,
        strategy: Strategy | Sequence[Strategy] | None = None,
        accuracy_budget: float | None = None,
        ratio_search: RatioSearch | EffectSearch | None = None,
        profile_dataset: Dataset | IterableDataset | None = None,
        max_samples: int | Literal["all"] | None = None,
        peft_config: "PeftConfig | None" = None,
        **trainer_arguments: Any,  # noqa: ANN401 - Trainer's own
    ) -> None:
        self.strategy, self.ratio_search = chosen_start(slice_ratio, strategy, accuracy_budget, ratio_search)
        if trainer_arguments.get("model_init") is not None or model is None:
            raise ValueError(
                "RemosTrainer needs model=, the teacher with its new head: what is kept depends on its weights. With "
                "model_init every train() would start from another model; make one RemosTrainer for each instead."
            )
        adapter_for(model, ())  # refuse wrapped models now, not after the data is loaded
        if peft_config is not None:
            check_adapters(self.strategy)
        if args is not None:
            check_pushing(args)
        samples_to_look_at(max_samples)
        self.peft_config, self.profile_dataset, self.max_samples = peft_config, profile_dataset, max_samples
        super().__init__(model, args, **trainer_arguments)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,  # noqa: ANN401 - Trainer's own
        **kwargs: Any,  # noqa: ANN401
    ) -> TrainOutput:
        """Start the student by the strategy, once, and train it.

        Args:
            resume_from_checkpoint: As in Trainer. Then the slice is read from the checkpoint and nothing is chosen.
                True takes the last whole one: what a killed run left half written is removed, with a warning.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            ValueError: `slice_ratio="auto"` has no held-out data that it could use, or cannot copy this trainer; or the
                strategy would overwrite the best checkpoint that the trainer takes back at the end.
            RemosError: The checkpoint was made by another strategy or search; or no ratio stays within the budget.
            FileNotFoundError: The checkpoint was not made by RemosTrainer.
            CorruptFileError: It is half written.
        """
        checkpoint = chosen_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self.moments is None:
            settle_loss_scale(self)
            self._start(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def _start(self, checkpoint: str | None) -> None:
        # Here, not in a callback: on_train_begin runs when a checkpoint's weights are loaded and the optimizer is
        # built, so that a reset there overwrites what was learned.
        moments = start_run(self, self.strategy, self.ratio_search, checkpoint, self._with_adapters)
        if self.peft_config is not None:
            if checkpoint is not None:
                moments.restart(self.model)
            self.model = self.model_wrapped = self._with_adapters(self.model)
            record_adapters(moments.sidecars, self.model)
        self.moments, self.strategy = moments, moments.asked
        hold_trainer(self, moments)
        self.add_callback(StartLog(self, moments.sidecars))

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        if self.peft_config is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, copy.deepcopy(self.peft_config))
