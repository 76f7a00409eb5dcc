"""fit(): the moments of a strategy in a bare Accelerate loop, for plain torch modules such as timm's."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, send_to_device
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from remos_hf.adapters.base import inputs_of
from remos_hf.adapters.class_names import take_class_names
from remos_hf.adapters.sequences import LABEL_KEYS
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.randomness import own_randomness
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Strategy
from remos_hf.training.fit_checkpoints import Progress, Saver, checkpoint_to_resume
from remos_hf.training.how_trained import described_loop
from remos_hf.training.moments import Moments, held_loss, warn_of_decay
from remos_hf.training.start import chosen_strategy
from remos_hf.training.windows import TrainingData, Window

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Fitted:
    """A trained student, and how it came to be.

    Attributes:
        model: The student: the very module that was given, unwrapped, in eval mode, on the device it trained on.
        sidecars: What was done before training; the same is written beside the saved student.
        steps: Optimizer steps since the start, those before a resumed checkpoint included.
        history: JSON values in the order of the steps: {"step", "epoch", "loss", "learning_rate"} for each step (the
            loss is the mean over all samples of the step, with what a hold adds) and {"step", "epoch", "evaluation"}.
        seconds: Wall-clock time of the steps and evaluations, those before a resumed checkpoint included.
    """

    model: nn.Module
    sidecars: Sidecars
    steps: int
    history: tuple[dict[str, Any], ...]
    seconds: float


def fit(
    model: nn.Module,
    train_dataset: Dataset,
    *,
    optimizer: Callable[[nn.Module], Optimizer],
    slice_ratio: float | None = None,
    strategy: Strategy | Sequence[Strategy] | None = None,
    profile_dataset: Dataset | None = None,
    max_samples: int | Literal["all"] | None = None,
    head: tuple[str, ...] | None = None,
    loss: LossFunction | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None,
    max_grad_norm: float | None = None,
    seed: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    num_workers: int = 0,
    evaluate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    output_dir: str | os.PathLike | None = None,
    save_steps: int | None = None,
    keep_checkpoints: int = 2,
    resume_from_checkpoint: bool | str | os.PathLike | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Fitted:
    """Start a student from its teacher by a strategy, in place, and train it: what RemosTrainer is to transformers.

    The student is sliced before it is wrapped and before its optimizer is built. A resumed run never slices again.

    One optimizer step takes the next `batch_size * gradient_accumulation_steps * processes` samples of the shuffled
    epoch, and follows the gradient of the mean loss over all of them, however they are cut into batches and shared out
    over processes. The last step of an epoch takes what is left; it, too, is a mean over its samples. Only layers that
    look across a batch (BatchNorm) notice how the samples are cut.

    The same arguments give the same bits. What a sample's augmentation draws from Python, NumPy or torch on the CPU
    depends on the seed, the epoch and the sample's place in the data set alone: not on workers, processes or resuming.
    The caller's random state stays as it was.

    Checkpoints are safetensors for the weights and what Accelerate's `save_state` writes for the rest. They are read
    with `weights_only=True`; all the same, resume only from a folder that your own run wrote. The teacher is never
    unpickled.

    Args:
        model: The teacher with its new head, before any wrapping.
        train_dataset: Samples by index (a list, a `torch` or a `datasets` Dataset), or a stream, which every process
            reads whole and takes its share of.
        optimizer: Builds the optimizer from the model, so that groups can be made by name; timm's
            `partial(create_optimizer_v2, opt="sgd", lr=0.01)` is one.
        slice_ratio: Share of the teacher's weights that ReMoS keeps, in (0, 1].
        strategy: Any other strategy, or a list of them; give one of the two.
        profile_dataset: The samples that decide the coverage, collated alike, if they are not to be read as
            `train_dataset` is: without its augmentation, or another share of the task's data.
        max_samples: Samples of it that decide, drawn by the seed (of a stream the first ones), for strategies that name
            no number. None takes `profiling.data_pass.DEFAULT_MAX_SAMPLES`, "all" all, also of a stream.
        head: Dotted names of the modules that `slice_ratio` spares; None lets the adapter find them. A strategy has a
            `head` of its own.
        loss: Gives the mean loss over a batch from (outputs, batch), a scalar; the model is then called without the
            labels of a mapping. None: cross-entropy for (inputs, labels) batches; for mappings the model is called with
            all of it and gives its own "loss", as with Trainer.
        scheduler: Builds the learning rate's scheduler from the optimizer and the number of steps; stepped once after
            each optimizer step, on any number of processes.
        epochs: Passes over the data; give this or `max_steps`.
        max_steps: Optimizer steps. A stream has no length and needs this.
        batch_size: Samples of one forward pass on one process.
        gradient_accumulation_steps: Forward passes of each process for one optimizer step.
        mixed_precision: "no" if not given, or what a given accelerator says. "fp16" needs a GPU. Like Trainer, takes
            over from an accelerator of another precision in the same process.
        max_grad_norm: Clip the gradient to this norm; None leaves it as it is.
        seed: Seed of the order, the augmentations, dropout, and the draw of samples to profile; at least 0.
        collate_fn: Makes a batch of samples; PyTorch's default if None. It may draw nothing.
        num_workers: Processes that load; a stream is read in this one.
        evaluate: Called with the student, in eval mode without gradients, after each epoch and after the last step, on
            every process; gives JSON values. What it draws does not change the training.
        output_dir: Where checkpoints and the student go; None saves nothing. Without resuming, it must hold no
            checkpoints.
        save_steps: Write a checkpoint after so many steps, and after the last; None writes none.
        keep_checkpoints: Checkpoints to keep.
        resume_from_checkpoint: True for the last one in `output_dir`, or the folder of one.
        progress: Show a bar on runs longer than two seconds.
        accelerator: One with settings of your own (device, DDP arguments), used for this run alone; what it has
            prepared is forgotten at the end. It must not accumulate gradients itself.

    Returns:
        The student and how it came to be. In `output_dir` lie `model.safetensors` (read it with
        `safetensors.torch.load_model`) and the sidecars.

    Raises:
        ValueError: An argument is out of range, or does not fit another.
        TypeError: The data is a DataLoader, or a batch, an output or a loss is of a kind that cannot be used.
        NonFiniteError: The loss or the gradient of a step is NaN or infinite. The step is not taken; checkpoints and a
            saved student stay as they were.
        RemosError: The checkpoint was made by another strategy, or the processes chose different slices.
        FileNotFoundError: The folder to resume from holds no checkpoint.

    Differs:
        Accelerate's own accumulation divides an incomplete last window by the full number of batches, and its
        data loader fills the last batch with samples seen before.
    """
    if head is not None and strategy is not None:
        raise ValueError(
            f"head= goes with slice_ratio=. Name the head in the strategy: {type(strategy).__name__}(...)."
        )
    strategy = chosen_strategy(slice_ratio, strategy, head)
    for name, value, least in (
        ("epochs", epochs, 1),
        ("max_steps", max_steps, 1),
        ("batch_size", batch_size, 1),
        ("gradient_accumulation_steps", gradient_accumulation_steps, 1),
        ("save_steps", save_steps, 1),
        ("keep_checkpoints", keep_checkpoints, 1),
        ("seed", seed, 0),
        ("num_workers", num_workers, 0),
    ):
        _check_at_least(name, value, least)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is a norm above 0, or None for no clipping, but got {max_grad_norm}.")
    _check_trainable(model)
    take_class_names(model, train_dataset)
    accelerator = _accelerator(accelerator, mixed_precision)
    data = TrainingData(
        train_dataset,
        collate_fn,
        batch_size,
        gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        seed,
        num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    profiled = data if profile_dataset is None else replace(data, dataset=profile_dataset, name="profile_dataset")
    until = _steps_to_take(data, epochs, max_steps)
    folder = None if output_dir is None else Path(output_dir)
    if folder is None and save_steps is not None:
        raise ValueError(f"save_steps={save_steps} needs output_dir, the folder that the checkpoints go to.")
    checkpoint = checkpoint_to_resume(folder, resume_from_checkpoint)
    if checkpoint is not None:
        Progress.check_settings(checkpoint, data)

    model.to(accelerator.device)
    moments = Moments(strategy, profiled.for_strategies(max_samples))
    if checkpoint is None:
        moments.start(model)
    else:
        moments.resume(model, checkpoint)
    with (
        own_randomness(seed + accelerator.process_index),
        _Loop(accelerator, model, moments, loss, optimizer, scheduler, until, max_grad_norm) as loop,
    ):
        reached = Progress() if checkpoint is None else Progress.load(checkpoint, accelerator)
        saver = Saver(accelerator, data, moments, folder, save_steps, keep_checkpoints)
        quiet = not (progress and accelerator.is_main_process)
        with tqdm(total=until, initial=reached.step, desc="Training", delay=2, disable=quiet) as bar:
            _train(loop, data, reached, until, evaluate, saver, bar)
    moments.finish(model)
    model.eval()
    moments.sidecars.config["training"] = described_loop(
        reached.history,
        optimizer=loop.optimizer_name,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        processes=accelerator.num_processes,
        seed=seed,
        precision=str(accelerator.mixed_precision),
        max_grad_norm=max_grad_norm,
        planned_steps=until,
    )
    saver.save_student(model)
    return Fitted(model, moments.sidecars, reached.step, tuple(reached.history), reached.seconds)


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} is a whole number of at least {least}, but got {value!r}.")


def _check_trainable(model: nn.Module) -> None:
    adapter_for(model, ())  # refuse wrapped models before anything is loaded
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"No parameter of {type(model).__name__} requires a gradient, so there is nothing to train. Call "
            "model.requires_grad_(True); weights outside the slice are reset, never frozen."
        )


def _accelerator(given: Accelerator | None, mixed_precision: str | None) -> Accelerator:
    accelerator = _new_accelerator(mixed_precision) if given is None else given
    if mixed_precision not in (None, accelerator.mixed_precision):
        raise ValueError(
            f"mixed_precision={mixed_precision!r}, but the accelerator was made with {accelerator.mixed_precision!r}. "
            "Give one of the two."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU, but the device is the CPU. Use 'bf16' or 'no'.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"The accelerator accumulates over {accelerator.gradient_accumulation_steps} steps by itself. Leave that "
            "to fit(gradient_accumulation_steps=...)."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"fit() trains in one process or by DDP, but the accelerator runs {accelerator.distributed_type}. Use "
            "RemosTrainer, or launch without it."
        )
    accelerator.sync_gradients = True  # shared by all accelerators; an interrupted accumulation leaves it off
    return accelerator


def _new_accelerator(mixed_precision: str | None) -> Accelerator:
    precision = "no" if mixed_precision is None else mixed_precision
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision is 'no', 'bf16' or 'fp16', but got {mixed_precision!r}.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # as transformers does: the precision is one for all accelerators of a process
    # The plugin keeps the launcher's environment from accumulating a second time.
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin)


def _steps_to_take(data: TrainingData, epochs: int | None, max_steps: int | None) -> int:
    if (epochs is None) == (max_steps is None):
        raise ValueError(f"Pass either epochs= or max_steps=, but got epochs={epochs} and max_steps={max_steps}.")
    if max_steps is not None:
        return max_steps
    if data.is_stream:
        raise ValueError(f"A stream has no length, so epochs={epochs} is no number of steps. Pass max_steps=.")
    return epochs * data.steps_per_epoch


class _Loop:
    """The wrapped student, its optimizer and its scheduler: takes steps. As a context, it unwraps the student."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        moments: Moments,
        loss: LossFunction | None,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None,
        until: int,
        max_grad_norm: float | None,
    ) -> None:
        self.accelerator, self.student, self.moments, self.loss = accelerator, student, moments, loss
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        made = optimizer(student)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer= builds a torch Optimizer from the model, but gave a {type(made).__name__}.")
        self.optimizer_name = type(made).__name__
        warn_of_decay(moments.strategy, any(group.get("weight_decay") for group in made.param_groups))
        self.scheduler = None if scheduler is None else scheduler(made, until)
        self._before = dict(vars(student))
        self.wrapped, self.optimizer = accelerator.prepare(student, made)
        if self.scheduler is not None:
            # Only so that checkpoints hold it: Accelerate's wrapper would step it once for each process.
            accelerator.prepare(self.scheduler)
        self._wrapping = {
            name for name, value in vars(student).items() if name not in self._before or value is not self._before[name]
        }

    def __enter__(self) -> "_Loop":
        return self

    def __exit__(self, *exception: object) -> None:
        # Accelerate marks a module as prepared and replaces its forward: a second fit() would find it wrapped.
        for name in self._wrapping:
            if name in self._before:
                vars(self.student)[name] = self._before[name]
            else:
                del vars(self.student)[name]
        self.student.zero_grad(set_to_none=True)
        self.wrapped = self.optimizer = self.scheduler = None
        self.accelerator.free_memory()

    @property
    def learning_rate(self) -> float:
        """The first group's."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, window: Window, number: int) -> float:
        """Take one optimizer step, and give the mean loss over its samples."""
        accelerator, device = self.accelerator, self.accelerator.device
        self.student.train()
        total = torch.zeros((), device=device)
        for batch, share, last in window.batches:
            batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss = self._loss_of(batch)
                # DDP takes the mean over the processes of what should be added up.
                accelerator.backward(loss * (share * accelerator.num_processes))
            total += loss.detach() * share
        norm = accelerator.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        # All processes look at the same two numbers: one that stopped alone would leave the others waiting.
        mean = float(accelerator.reduce(total, reduction="sum"))
        self._check_finite(mean, float(norm), number)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            if self.scheduler is not None:
                self.scheduler.step()
            self.moments.after_step(self.student)
        self.optimizer.zero_grad()
        return mean

    def _check_finite(self, loss: float, norm: float, number: int) -> None:
        broken = ""
        if not np.isfinite(loss):
            broken = f"The loss of step {number} is {loss}"
        elif not np.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such steps and scales down
            broken = f"The loss of step {number} is {loss:.4g}, but its gradient's norm is {norm}"
        if broken:
            raise NonFiniteError(
                f"{broken}; the step was not taken. Lower the learning rate, set max_grad_norm, or look for NaN in the "
                "data. The last checkpoint is whole."
            )

    def _loss_of(self, batch: Any) -> Tensor:  # noqa: ANN401 - any batch
        if self.moments.hold is None:
            return self._plain_loss(batch)[0]
        return held_loss(self.moments.hold, self.student, batch, self._plain_loss)[0]

    def _plain_loss(self, batch: Any) -> tuple[Tensor, Any]:  # noqa: ANN401 - any batch
        outputs = self._forward(batch)
        loss = _own_loss(outputs, batch) if self.loss is None else self.loss(outputs, batch)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"The loss is a scalar tensor, the mean over the batch's samples, but got {found}.")
        return loss, outputs

    def _forward(self, batch: Any) -> Any:  # noqa: ANN401 - any batch, any output
        if not isinstance(batch, Mapping):
            return self.wrapped(inputs_of(batch))
        if self.loss is None:
            return self.wrapped(**batch)
        return self.wrapped(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})


def _own_loss(outputs: Any, batch: Any) -> Tensor:  # noqa: ANN401 - any batch, any output
    if isinstance(batch, Mapping):
        if isinstance(outputs, Mapping) and "loss" in outputs:
            return outputs["loss"]
        raise TypeError(
            f"The model was called with {sorted(batch)} and should give a 'loss', but gave a {type(outputs).__name__} "
            "without one. Pass loss=, a function of (outputs, batch)."
        )
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"Without loss=, a batch is (inputs, labels) or a mapping, but got a {type(batch).__name__}. Pass loss=, a "
            "function of (outputs, batch)."
        )
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    return functional.cross_entropy(logits, batch[1])


def _train(
    loop: _Loop,
    data: TrainingData,
    reached: Progress,
    until: int,
    evaluate: Callable[[nn.Module], Mapping[str, Any]] | None,
    saver: Saver,
    bar: tqdm,
) -> None:
    spent, start = reached.seconds, time.perf_counter()
    while reached.step < until:
        for window in data.windows(reached.epoch, reached.taken):
            rate = loop.learning_rate
            loss = loop.step(window, reached.step + 1)
            reached.step += 1
            entry = {"step": reached.step, "epoch": reached.epoch}
            reached.history.append({**entry, "loss": loss, "learning_rate": rate})
            if evaluate is not None and (window.ends_epoch or reached.step == until):
                reached.history.append({**entry, "evaluation": _evaluated(loop.student, evaluate, data.seed)})
            reached.epoch, reached.taken = (
                (reached.epoch + 1, 0) if window.ends_epoch else (reached.epoch, reached.taken + 1)
            )
            reached.seconds = spent + time.perf_counter() - start
            saver.save_if_due(reached, until)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()
            if reached.step == until:
                break


def _evaluated(student: nn.Module, evaluate: Callable[[nn.Module], Mapping[str, Any]], seed: int) -> dict[str, Any]:
    student.eval()
    with own_randomness(seed), torch.no_grad():
        found = evaluate(student)
    try:
        return json.loads(json.dumps(dict(found)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate= gives a mapping of JSON values, but gave {found!r} ({error}).") from error
