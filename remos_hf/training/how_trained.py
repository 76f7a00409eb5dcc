"""How a student was trained, as its record says it: the hyper-parameters, and how far training has come."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer

_TIMINGS = ("_runtime", "_per_second", "_time")


def described_trainer(trainer: Trainer) -> dict[str, Any]:
    """Give what a Trainer trains with, and the steps that it has taken, as JSON values.

    Args:
        trainer: After `train()` has begun.
    """
    args, state = trainer.args, trainer.state
    facts = {
        "learning_rate": args.learning_rate,
        "lr_scheduler": _word(args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "optimizer": _word(args.optim),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "epochs": args.num_train_epochs,
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "seed": args.seed,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "steps": state.global_step,
        "planned_steps": state.max_steps,
    }
    if args.load_best_model_at_end and getattr(state, "best_global_step", None):
        facts["best_step"] = state.best_global_step
    return {key: value for key, value in facts.items() if value is not None}


def described_loop(
    history: Sequence[Mapping[str, Any]],
    *,
    optimizer: str,
    batch_size: int,
    gradient_accumulation_steps: int,
    processes: int,
    seed: int,
    precision: str,
    max_grad_norm: float | None,
    planned_steps: int,
) -> dict[str, Any]:
    """Give what `fit` trained with, as JSON values, in the words of `described_trainer`.

    Args:
        history: Of all steps. The learning rate is the highest one, as only the caller knows what was asked for.
        optimizer: Name of its class.
        batch_size: Samples of one forward pass on one process.
        gradient_accumulation_steps: Forward passes of each process for a step.
        processes: How many trained.
        seed: Of the run.
        precision: As Accelerate names it.
        max_grad_norm: None for no clipping.
        planned_steps: Steps asked for.
    """
    steps = [entry for entry in history if "learning_rate" in entry]
    facts = {
        "learning_rate": max((entry["learning_rate"] for entry in steps), default=None),
        "optimizer": optimizer,
        "max_grad_norm": max_grad_norm,
        "epochs": steps[-1]["epoch"] + 1 if steps else None,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "processes": processes,
        "seed": seed,
        "precision": "fp32" if precision == "no" else precision,
        "steps": len(steps),
        "planned_steps": planned_steps,
    }
    return {key: value for key, value in facts.items() if value is not None}


def last_evaluation(history: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Give the figures of a Trainer's last evaluation, without the time that it took; None if there was none."""
    found = next((entry for entry in reversed(history) if any(name.startswith("eval_") for name in entry)), {})
    metrics = {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if not name.endswith(_TIMINGS) and name != "runtime"} or None


def _word(value: Any) -> str:  # noqa: ANN401 - an enum of transformers, or its value
    return str(getattr(value, "value", value))
