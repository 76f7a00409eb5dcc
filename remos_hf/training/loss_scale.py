"""Whether Trainer takes a batch's loss for a mean, or for a share of that of all accumulated batches."""

import math

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from remos_hf.activations import evaluating
from remos_hf.randomness import own_randomness
from remos_hf.training.profiling_data import student_batches


def settle_loss_scale(trainer: Trainer) -> None:
    """Let Trainer count the items of all accumulated batches only where the loss really divides by them.

    Trainer hands the count to every model whose forward takes further arguments, and from then on divides the loss
    neither by the accumulation steps nor by the processes. Language models divide by it; classification heads pass over
    it, so that their updates would grow with both (transformers #47688). Which of the two a model does is tried on a
    batch: the loss of eval mode with two counts. Nothing else is changed, and the random state stays as it was.

    Args:
        trainer: A trainer that has not trained. `model_accepts_loss_kwargs` is settled.
    """
    args = trainer.args
    alone = args.gradient_accumulation_steps == 1 and args.world_size == 1 and args.n_gpu <= 1
    if alone or not trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
        return  # nothing to grow with; never handed on; or divided by the caller's own function
    data = trainer.train_dataset
    if isinstance(data, IterableDataset) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # A stream may not be read twice, and a sharded model not be run alone.
        trainer.model_accepts_loss_kwargs = type(trainer.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return
    told = broadcast_object_list([_counts_items(trainer) if args.process_index == 0 else None])
    trainer.model_accepts_loss_kwargs = told[0]


def is_share_of_all(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether Trainer takes a batch's loss for a share of that of all accumulated batches, as it says itself."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)  # of newer versions
    if declared is not None:
        return declared
    return (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
        trainer.compute_loss_func is not None
    )


def _counts_items(trainer: Trainer) -> bool:
    batch = next(iter(student_batches(trainer, trainer.args.eval_batch_size)), None)
    if batch is None:
        return False
    with own_randomness(None), torch.no_grad(), evaluating(trainer.model):
        inputs = trainer._prepare_inputs(batch)
        losses = [
            float(trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(items)))
            for items in (1, 2)
        ]
    return not math.isclose(*losses, rel_tol=1e-3)
