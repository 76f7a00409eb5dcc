"""A Trainer whose student was started by a strategy: what it saves and publishes says so."""

import copy
import logging
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import is_peft_model
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from remos_hf.adapters.weights_hash import hash_of_folder, hash_of_model
from remos_hf.errors import RemosError
from remos_hf.judging.report import DefectReport
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.sharing.hub import Pushed, push_to_hub, push_while_training
from remos_hf.sharing.layout import CARD_FILE, REPORT_FILE
from remos_hf.sharing.model_card import model_card
from remos_hf.sharing.record import Sidecars
from remos_hf.slicing.relevant_slice import RelevantSlice
from remos_hf.training.how_trained import described_trainer, last_evaluation
from remos_hf.training.moments import Moments
from remos_hf.whole import replace_file

logger = logging.getLogger(__name__)


class RecordedTrainer(Trainer):
    """A Trainer that saves its student with the record beside it, and publishes it with our card.

    The base of RemosTrainer, and what `attach_remos` makes of any other trainer, before whose class it stands.
    Until the student was started it is the Trainer that it would be without.
    """

    moments: Moments | None = None

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as an ordinary checkpoint, with the sidecars beside it.

        A student with adapters is saved merged, and the log says so: the adapters alone would be loaded onto the
        unsliced teacher. Checkpoints hold the adapters.

        Args:
            output_dir: Where to; `args.output_dir` if None.
            _internal_call: As in Trainer.
        """
        if self.sidecars is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = _internal_call and folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        # Ours first: Trainer's own state, the last file of a checkpoint, says that it is whole.
        if is_checkpoint:
            self.moments.save(folder)
        if self.args.should_save:
            self._record_training()
            self.sidecars.save(folder)
        if is_checkpoint or not is_peft_model(self.accelerator.unwrap_model(self.model)):
            super().save_model(output_dir, _internal_call)
        else:
            self._save_merged(output_dir, _internal_call)

    def _record_training(self) -> None:
        config = self.sidecars.config
        config["training"] = described_trainer(self)
        evaluation = last_evaluation(self.state.log_history)
        if evaluation is not None:
            config["evaluation"] = evaluation

    def _save_merged(self, output_dir: str | None, _internal_call: bool) -> None:
        adapted = self.model
        self.model = copy.deepcopy(self.accelerator.unwrap_model(adapted)).merge_and_unload()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = adapted
        if self.args.should_save:
            logger.warning(
                "Saved to %s: the student with its adapters merged into the sliced base, a whole model. The adapters "
                "alone would be loaded onto the unsliced teacher; they are in the checkpoints.",
                output_dir or self.args.output_dir,
            )

    def create_model_card(self, *arguments: Any, **said: Any) -> None:  # noqa: ANN401 - Trainer's own
        """Write our card to `output_dir`, with what the arguments say on it.

        Args:
            *arguments: Before the student was started: as the trainer's own method takes them.
            **said: All that `Trainer.create_model_card` takes, and `dataset_name`, as TRL calls `dataset`.
        """
        if self.sidecars is None:
            super().create_model_card(*arguments, **said)
            return
        if not self.is_world_process_zero():
            return
        if arguments:
            raise TypeError("The card of a student takes its arguments by name, such as language='en'.")
        folder = Path(self.args.output_dir)
        report = DefectReport.load(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
        self._record_training()
        weights = report and (hash_of_folder(folder) or hash_of_model(self.accelerator.unwrap_model(self.model)))
        card = model_card(self.sidecars, report, repo_id=self._repo_id(), weights=weights, **self._card_words(said))
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / CARD_FILE, str(card).encode())

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
            **about: All that `Trainer.push_to_hub` takes for its card (`language`, `license`, `tags`, `model_name`,
                `finetuned_from`, `tasks`, `dataset`, `dataset_tags`, `dataset_args`), and `report`, `report_student`,
                `report_task`, `command`, `metrics`, `dry_run` of `remos_hf.push_to_hub`. The card's metrics are those
                of the last evaluation if not given.

        Returns:
            What was pushed; None on processes other than the main one.

        Raises:
            ValueError: `blocking` is False, or the student was not started yet.
            RemosError: The Hub could not be reached or refused; the message says how to go on. The student is saved.
        """
        if not blocking:
            raise ValueError("push_to_hub waits until the commit is there; RemosTrainer offers no blocking=False.")
        if self.sidecars is None:
            raise ValueError("There is no student to push yet: its record is made when train() starts it.")
        args = self.args
        self._announce_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        self._finish_current_push()
        repo_id = self._repo_id()
        if repo_id.startswith("you/") and not about.get("dry_run"):
            repo_id = f"{_user(token, args.output_dir)}/{repo_id.removeprefix('you/')}"
        return push_to_hub(
            args.output_dir,
            repo_id,
            processing_class=self.processing_class,
            private=private is not False,
            token=token,
            revision=revision or args.hub_revision,
            commit_message=commit_message,
            **self._card_words(about),
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that Trainer pushes to while it trains; private unless `hub_private_repo=False`.

        Args:
            token: As in Trainer.
            private: Whether a new repository is private; `args.hub_private_repo`, or True.
        """
        given = self.args.hub_private_repo
        self.args.hub_private_repo = given is not False if private is None else private
        try:
            super().init_hf_repo(token=token)
            if self.is_world_process_zero() and given is None and private is None:
                logger.warning(
                    "Trainer pushes to %s. If it is new it is private; TrainingArguments(hub_private_repo=False) makes "
                    "it public.",
                    self.hub_model_id,
                )
        finally:
            self.args.hub_private_repo = given

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds of the student while it trains, by the rules of every push of ours."""
        args = self.args
        if self.sidecars is None or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if is_peft_model(self.accelerator.unwrap_model(self.model)):
            logger.info("%s is not pushed: it holds adapters, which belong on the sliced base.", checkpoint_folder)
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._announce_push()
        job = push_while_training(
            checkpoint_folder,
            self._repo_id(),
            private=args.hub_private_repo is not False,
            token=args.hub_token,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            **self._card_words({}),
        )
        self.push_in_progress = PushInProgress([job])

    def hyperparameter_search(self, *arguments: Any, **options: Any) -> NoReturn:  # noqa: ANN401 - Trainer's own
        """Refuse, before a backend is asked for: each trial would start from another model.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "hyperparameter_search makes a new model for each trial (model_init), while a student is started once, "
            "from the weights of its model. Make one trainer for each setting; the slice ratio alone is searched by "
            "slice_ratio='auto'."
        )

    def _announce_push(self) -> None:
        tell = getattr(self.callback_handler, "on_push_begin", None)  # of transformers 5
        if tell is not None:
            tell(self.args, self.state, self.control)

    def _repo_id(self) -> str:
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        return name if "/" in name else f"you/{name}"

    def _card_words(self, said: dict[str, Any]) -> dict[str, Any]:
        """What a trainer says of its card, in the words of ours, with the tags that libraries put on the model."""
        said = dict(said)
        if "dataset_name" in said:
            said.setdefault("dataset", said.pop("dataset_name"))
        tags = said.get("tags") or ()
        known = getattr(self.accelerator.unwrap_model(self.model), "model_tags", None) or ()
        said["tags"] = [*([tags] if isinstance(tags, str) else tags), *known]
        return said


def check_pushing(args: TrainingArguments) -> None:
    """Refuse a way of pushing while training that sends whole checkpoints.

    Raises:
        ValueError: `hub_strategy` is "checkpoint" or "all_checkpoints".
    """
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy='{args.hub_strategy.value}' pushes optimizer and scheduler states, which are pickles, and "
            "trainer_state.json, which holds paths of this machine. Use 'every_save' (the student at every checkpoint) "
            "or 'end'."
        )


def record_adapters(sidecars: Sidecars, model: nn.Module) -> None:
    """Put the kind of a model's adapters, and how they are saved, into its record."""
    kinds = sorted({str(getattr(one.peft_type, "value", one.peft_type)) for one in model.peft_config.values()})
    sidecars.config["adapters"] = {"kind": ", ".join(kinds), "saved": "merged into the sliced base"}


def _user(token: str | None, kept: str) -> str:
    try:
        return HfApi().whoami(token=token)["name"]
    except (HTTPError, OSError, ValueError) as error:
        raise RemosError(
            f"Whose repository is meant is not known: the Hub did not say who you are ({error}). The student is "
            f"kept in {kept}. Log in (`hf auth login`), or name it whole: TrainingArguments(hub_model_id='user/name')."
        ) from error
