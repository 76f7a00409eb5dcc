"""RemosTrainer: transformers.Trainer that starts its student by a strategy."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.sharing.hub import Pushed, push_to_hub
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.strategies.base import Strategy
from remos_hf.training.moments import Moments, check_adapters, hold_trainer
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.reporting import StartLog
from remos_hf.training.start import chosen_start, start_run

if TYPE_CHECKING:
    from peft import PeftConfig


class RemosTrainer(Trainer):
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
        ratio_search: Only with "auto": the whole search (ratios, length of the trials, metric, budget).
        profile_dataset: The samples that decide the coverage, if they are not to be read as `train_dataset` is: without
            its augmentation, or another share of the task's data.
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
        ratio_search: RatioSearch | None = None,
        profile_dataset: Dataset | IterableDataset | None = None,
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
        self.peft_config, self.profile_dataset = peft_config, profile_dataset
        self.moments: Moments | None = None
        super().__init__(model, args, **trainer_arguments)
        # With it, Trainer neither divides the loss by the accumulation steps nor by the processes, while classification
        # heads and our own loss ignore the count they are given: updates would grow with both (transformers #47688).
        self.model_accepts_loss_kwargs = False

    @property
    def sidecars(self) -> Sidecars | None:
        """How the student came to be, as it is written beside it; None before training."""
        return self.moments and self.moments.sidecars

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
            ValueError: `slice_ratio="auto"` has no held-out data that it could use, or cannot copy this trainer.
            RemosError: The checkpoint was made by another strategy or search; or no ratio stays within the budget.
            FileNotFoundError: The checkpoint was not made by RemosTrainer.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if self.moments is None:
            self._start(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

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
        moments = start_run(self, self.strategy, self.ratio_search, checkpoint, self._with_adapters)
        if self.peft_config is not None:
            if checkpoint is not None:
                moments.restart(self.model)
            self.model = self.model_wrapped = self._with_adapters(self.model)
        self.moments, self.strategy = moments, moments.asked
        hold_trainer(self, moments)
        self.add_callback(StartLog(self, moments.sidecars))

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        if self.peft_config is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, copy.deepcopy(self.peft_config))

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
        if self.moments is not None and _internal_call and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.moments.save(folder)
        if self.sidecars is not None and self.args.should_save:
            # Pushing while training uploads the output folder with the checkpoint's weights copied into it.
            for place in {folder, Path(self.args.output_dir)} if self.args.push_to_hub else {folder}:
                self.sidecars.save(place)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,  # noqa: ANN401 - what `remos_hf.push_to_hub` takes
    ) -> Pushed | None:
        """Save the student, and push it with its record and its model card in one commit; private unless said.

        Args:
            commit_message: The commit's message.
            blocking: Must be True: what was pushed is returned when it is there.
            token: Of the Hub; `args.hub_token`, or the stored one.
            revision: Branch; `args.hub_revision`, or the main one.
            private: Whether a new repository is private; `args.hub_private_repo`, or True.
            **about: `report`, `report_student`, `report_task`, `command`, `dataset`, `language`, `license`, `metrics`,
                `dry_run` of `remos_hf.push_to_hub`. The card's metrics are those of the last evaluation if not given.

        Returns:
            What was pushed; None on processes other than the main one.

        Raises:
            ValueError: `blocking` is False.
            RemosError: The Hub could not be reached or refused; the message says how to go on. The student is saved.
        """
        if not blocking:
            raise ValueError("push_to_hub waits until the commit is there; RemosTrainer offers no blocking=False.")
        args = self.args
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        token = args.hub_token if token is None else token
        private = getattr(args, "hub_private_repo", None) if private is None else private
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        if "/" not in repo_id and not about.get("dry_run"):
            repo_id = f"{_user(token, args.output_dir)}/{repo_id}"
        return push_to_hub(
            args.output_dir,
            repo_id if "/" in repo_id else f"you/{repo_id}",
            processing_class=self.processing_class,
            private=private is not False,
            token=token,
            revision=revision or getattr(args, "hub_revision", None),
            commit_message=commit_message,
            **{"metrics": _last_evaluation(self.state.log_history), **about},
        )

    def _save_merged(self, output_dir: str | None, _internal_call: bool) -> None:
        adapted = self.model
        self.model = copy.deepcopy(self.accelerator.unwrap_model(adapted)).merge_and_unload()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = adapted


def _user(token: str | None, kept: str) -> str:
    try:
        return HfApi().whoami(token=token)["name"]
    except (HTTPError, OSError, ValueError) as error:
        raise RemosError(
            f"Whose repository is meant is not known: the Hub did not say who you are ({error}). The student is "
            f"kept in {kept}. Log in (`hf auth login`), or name it whole: TrainingArguments(hub_model_id='user/name')."
        ) from error


def _last_evaluation(history: list[dict[str, float]]) -> dict[str, float] | None:
    found = next((entry for entry in reversed(history) if any(name.startswith("eval_") for name in entry)), {})
    timings = ("_runtime", "_per_second", "_time")
    metrics = {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if not name.endswith(timings) and name != "runtime"} or None
