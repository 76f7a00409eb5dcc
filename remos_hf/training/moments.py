"""The moments of a strategy in a run: the one module that calls them, for every trainer.

prepare and hold before the student is wrapped, loss and after_step while it trains, finish when it has. What holds the
student lies beside every checkpoint (`remos_hold.safetensors`).
"""

import copy
import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import RemosError, TeacherMismatchError
from remos_hf.layers import weights_hash
from remos_hf.profiling.processes import in_processes, told_by_all
from remos_hf.profiling.sidecar_file import read_tensors, write_tensors
from remos_hf.randomness import own_randomness
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Hold, Preparation, Run, Strategy
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.student_data import StudentData
from remos_hf.training.loss_scale import is_share_of_all

logger = logging.getLogger(__name__)

HOLD_FILE = "remos_hold.safetensors"
_FORMAT = "remos_hold/1"
_TENSOR = "$tensor"


class Moments:
    """One run of a strategy over one student.

    Args:
        strategy: The recipe. It takes the run's seed if it names none.
        data: The student's data.

    Attributes:
        asked: The recipe as it was given.
        strategy: The recipe with its seed.
        sidecars: How the student came to be; None before it was started.
        hold: What holds it; None if nothing does.
    """

    def __init__(self, strategy: Strategy, data: StudentData) -> None:
        self.asked, self.strategy, self.data = strategy, strategy.with_seed(data.seed), data
        self.sidecars: Sidecars | None = None
        self.hold: Hold | None = None
        self._teacher_hash = ""

    def start(self, student: nn.Module) -> Sidecars:
        """Let the strategy prepare a student, in place, and say what it did. The global random state stays as it was.

        Args:
            student: The teacher with its new head, before it is wrapped and before its optimizer is built.

        Raises:
            RemosError: The processes chose different slices, or another one failed.
        """
        teacher = self._teacher_of(student)
        preparation = failure = None
        try:  # whoever fails says so before the others wait for it in training
            with own_randomness(self.data.seed):
                preparation = self.strategy.prepare(student, self.data)
            self._take_hold(student, teacher)
            if self.hold is not None:
                with own_randomness(self.data.seed):
                    self.hold.begin(student, self.data)
        except Exception as error:
            if not in_processes():
                raise
            failure = error
        _check_same_everywhere(preparation, failure)
        if preparation.summary():
            logger.info(preparation.summary())
        self.sidecars = Sidecars.of(self.strategy, preparation, student)
        return self.sidecars

    def resume(self, student: nn.Module, checkpoint: str | Path) -> Sidecars:
        """Take the start and the hold of a checkpoint; nothing is chosen again, and the student stays as it is.

        Args:
            student: The teacher with its new head, as the run that wrote the checkpoint found it.
            checkpoint: The folder.

        Raises:
            RemosError: The checkpoint was made by another strategy.
            TeacherMismatchError: Its student was held to another teacher.
            FileNotFoundError: It was not made by us, or holds nothing of what held the student.
        """
        self.sidecars = Sidecars.load(checkpoint)
        self.strategy = _as_recorded(self.asked, self.sidecars.config["strategy"]).with_seed(self.data.seed)
        self.sidecars.check_strategy(self.strategy)
        self._take_hold(student, self._teacher_of(student))
        self._load(Path(checkpoint))
        return self.sidecars

    def restart(self, student: nn.Module) -> None:
        """Start the base of a resumed adapter run as it was started: a checkpoint of adapters holds no base weights."""
        with own_randomness(self.data.seed):
            self.strategy.restart(student, self.data, self.sidecars.relevant_slice)

    def after_step(self, student: nn.Module) -> None:
        """Let the hold act after an optimizer step that was taken."""
        if self.hold is not None:
            self.hold.after_step(student)

    def finish(self, student: nn.Module) -> None:
        """Let the hold act after training. The global random state stays as it was."""
        if self.hold is not None:
            with own_randomness(self.data.seed):
                self.hold.finish(student, self.data)
            details = self.hold.details()
            if details:
                self.sidecars.config["finish"] = details

    def save(self, checkpoint: str | Path) -> None:
        """Write what holds the student into a checkpoint. Every process calls it; those whose state differs write it.

        Args:
            checkpoint: The folder; it is made if it is not there.
        """
        if self.hold is None:
            return
        tensors: dict[str, Tensor] = {}
        state = _taken_apart(self.hold.state_dict(), "", tensors)
        rank, mine = _rank(), _digest(tensors, state)
        found = told_by_all(mine) if in_processes() else [mine]
        if rank > 0 and found[rank] == found[0]:
            return
        folder = Path(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"state": state, "teacher_hash": self._teacher_hash, "differs": found[rank] != found[0]}
        write_tensors(folder / _hold_file(rank), tensors, _FORMAT, metadata)

    def _load(self, checkpoint: Path) -> None:
        if self.hold is None:
            return
        path = checkpoint / _hold_file(_rank())
        path = path if path.is_file() else checkpoint / HOLD_FILE
        if not path.is_file():
            name = self.strategy.to_dict()["name"]
            raise FileNotFoundError(
                f"There is no {path}, so what {name} kept of its student is lost. Resume from another checkpoint, or "
                "start anew from the teacher."
            )
        tensors, metadata = read_tensors(path, _FORMAT, ("state", "teacher_hash", "differs"), finite=False)
        if metadata["teacher_hash"] != self._teacher_hash:
            raise TeacherMismatchError(
                f"{checkpoint} was held to a teacher with hash {metadata['teacher_hash'][:12]}..., but the model that "
                f"was given has {self._teacher_hash[:12]}... Give the model that the run was started with; its trained "
                "weights are read from the checkpoint."
            )
        self.hold.load_state_dict(_put_together(metadata["state"], tensors))

    def _teacher_of(self, student: nn.Module) -> nn.Module | None:
        if not self.strategy.holds:
            return None
        return copy.deepcopy(student).requires_grad_(False).eval()

    def _take_hold(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if teacher is not None:
            with own_randomness(self.data.seed):
                self.hold = self.strategy.hold(student, teacher)
        if self.hold is not None and self.hold.needs_teacher:
            self._teacher_hash = weights_hash(adapter_for(teacher, _head(self.strategy, teacher)).layers())


def check_adapters(strategy: Strategy) -> None:
    """Refuse adapters where a strategy cannot do with them.

    Raises:
        ValueError: It cannot.
    """
    if strategy.refuses_adapters:
        name = strategy.to_dict()["name"]
        raise ValueError(f"{name} cannot train adapters: {strategy.refuses_adapters} Train the whole model.")


def check_best_model(strategy: Strategy, args: TrainingArguments) -> None:
    """Refuse a trainer that would load its best checkpoint, only for a strategy to overwrite it.

    Raises:
        ValueError: It would.
    """
    if args.load_best_model_at_end and strategy.replaces_weights:
        raise ValueError(
            f"{strategy.to_dict()['name']} has other weights take the place of those that trained, such as their "
            "average, and so of the best checkpoint, which the trainer takes back at the end. Set "
            "load_best_model_at_end=False, or leave the other weights out (Renofeation: average_decay=0)."
        )


def warn_of_decay(strategy: Strategy, decays: bool) -> None:
    """Warn where an optimizer decays weights that a strategy decays by its own loss."""
    if decays and strategy.decays_itself:
        warnings.warn(
            f"{strategy.to_dict()['name']} pulls weights to where they should be by its own loss, and the optimizer's "
            "weight decay pulls all of them to 0 beside it, which its authors leave out. Set weight_decay=0. "
            "(remos_hf)",
            stacklevel=3,
        )


def hold_trainer(trainer: Trainer, moments: Moments) -> None:
    """Let what holds the student act in a Trainer's steps. Without a hold the trainer's loss is left untouched.

    Args:
        trainer: Any Trainer, before `train()`.
        moments: Those of its run, started.

    Raises:
        ValueError: The trainer shards or replicates the student, so that a hold would not see it whole.
    """
    if moments.hold is None:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.n_gpu > 1:
        raise ValueError(
            f"{moments.strategy.to_dict()['name']} acts on the student while it trains, which needs it whole: in one "
            "process, or by DDP (accelerate launch, torchrun), without FSDP, DeepSpeed or DataParallel."
        )
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else [vars(trainer.args)]
    warn_of_decay(moments.strategy, any(group.get("weight_decay") for group in groups))
    own = trainer.compute_loss

    def compute_loss(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **more: Any,  # noqa: ANN401 - whatever other versions pass
    ) -> Tensor | tuple[Tensor, Any]:
        if not model.training:
            return own(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **more)
        # A loss that was divided by the items of all accumulated batches is brought to the scale of a mean, on which a
        # hold adds to it, and back.
        scale = trainer.current_gradient_accumulation_steps if is_share_of_all(trainer, num_items_in_batch) else 1

        def run(given: Mapping[str, Any]) -> tuple[Tensor, Any]:
            loss, outputs = own(model, dict(given), True, num_items_in_batch=num_items_in_batch, **more)
            return loss * scale, outputs

        loss, outputs = held_loss(moments.hold, trainer.model, inputs, run)
        return (loss / scale, outputs) if return_outputs else loss / scale

    trainer.compute_loss = compute_loss
    trainer.add_callback(_Held(trainer, moments))


def held_loss(hold: Hold, student: nn.Module, inputs: Any, run: Run) -> tuple[Tensor, Any]:  # noqa: ANN401
    """Give a hold's loss of one batch.

    Raises:
        TypeError: It gave no pair of a scalar and outputs.
    """
    given = hold.loss(student, inputs, run)
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], Tensor) or given[0].dim() > 0:
        raise TypeError(f"{type(hold).__name__}.loss gives (a scalar loss, outputs), but gave {type(given).__name__}.")
    return given


class _Held(TrainerCallback):
    """Lets the hold act after every step that was taken, and when training ends."""

    def __init__(self, trainer: Trainer, moments: Moments) -> None:
        self.trainer, self.moments = trainer, moments

    def on_step_end(self, *_: object, **__: object) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.moments.after_step(self.trainer.model)

    def on_train_end(self, *_: object, **__: object) -> None:
        self.moments.finish(self.trainer.model)


def _head(strategy: Strategy, teacher: nn.Module) -> tuple[str, ...]:
    """Give what is new in a teacher by any part that holds its student, and so may be another in a resumed run."""
    parts = strategy.strategies if isinstance(strategy, Composed) else (strategy,)
    named = [one.head for one in parts if one.holds and hasattr(one, "head")] or [None]
    return tuple(dict.fromkeys(name for head in named for name in adapter_for(teacher, head).head))


def _check_same_everywhere(preparation: Preparation | None, failure: Exception | None) -> None:
    if not in_processes():
        return
    relevant = preparation and preparation.relevant_slice
    chosen = None if relevant is None else (relevant.teacher_hash, relevant.num_kept)
    told = told_by_all((chosen, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(told):
        if failed:
            raise RemosError(f"Process {rank} failed while it started the student: {failed}")
    found = [chosen for chosen, _ in told]
    if len(set(found)) > 1:
        raise RemosError(f"The processes chose different slices ({found}): they did not load the same teacher.")


def _rank() -> int:
    return torch.distributed.get_rank() if in_processes() else 0


def _hold_file(rank: int) -> str:
    return HOLD_FILE if rank == 0 else HOLD_FILE.replace(".", f"_{rank}.", 1)


def _taken_apart(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - any JSON value
    """Give a state as JSON values, its tensors put aside by name."""
    if isinstance(state, Tensor):
        tensors[name] = state.detach().cpu()
        return {_TENSOR: name}
    if isinstance(state, Mapping):
        return {key: _taken_apart(one, f"{name}/{key}".lstrip("/"), tensors) for key, one in state.items()}
    if isinstance(state, (list, tuple)):
        return [_taken_apart(one, f"{name}/{place}".lstrip("/"), tensors) for place, one in enumerate(state)]
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(
        f"What a hold keeps is tensors, JSON values and dicts of them, but '{name}' is a {type(state).__name__}. Of a "
        "torch.Generator give get_state()."
    )


def _put_together(state: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(state, list):
        return [_put_together(one, tensors) for one in state]
    if not isinstance(state, dict):
        return state
    if state.keys() == {_TENSOR}:
        return tensors[state[_TENSOR]]
    return {key: _put_together(one, tensors) for key, one in state.items()}


def _digest(tensors: Mapping[str, Tensor], state: Any) -> str:  # noqa: ANN401 - any JSON value
    digest = hashlib.sha256(repr(state).encode())
    for name in sorted(tensors):
        digest.update(memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _as_recorded(asked: Strategy, recorded: Mapping[str, Any]) -> Strategy:
    """Take a record's seeds where the recipe names none: what was started by them is not started again."""
    parts = recorded.get("strategies")
    if isinstance(asked, Composed) and parts is not None and len(parts) == len(asked.strategies):
        return Composed(tuple(_as_recorded(one, part) for one, part in zip(asked.strategies, parts, strict=True)))
    return asked if recorded.get("seed") is None else asked.with_seed(recorded["seed"])
