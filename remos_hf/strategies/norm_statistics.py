"""The statistics of batch norms, taken anew after weights were swapped."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from remos_hf.activations import evaluating
from remos_hf.adapters.base import Adapter


def has_norm_statistics(model: nn.Module) -> bool:
    """Whether a model has a batch norm that keeps a running mean and variance."""
    return bool(_norms_of(model))


def _norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]


@torch.no_grad()
def redo_norm_statistics(
    adapter: Adapter, batches: Iterable, *, across_processes: bool = True, dropout: bool = False
) -> None:
    """Take the running mean and variance of every batch norm anew: the mean over batches, of all processes.

    Everything else runs in eval mode. Without batch norms nothing is read.

    Args:
        adapter: Of the model; its modes are put back.
        batches: This process's share of the data.
        across_processes: Whether it is a share; False if every process reads all of it.
        dropout: Whether everything runs in train mode instead, so that dropout acts.

    Source:
        torch.optim.swa_utils.update_bn.
        Differs: batches are mappings too, dropout is off unless asked for, and processes share the batches out.
    """
    norms = _norms_of(adapter.model)
    if not norms:
        return
    device = norms[0].running_mean.device
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        with evaluating(adapter.model):
            adapter.model.train(dropout)
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the cumulative mean
            for batch in batches:
                adapter.forward(send_to_device(batch, device))
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if across_processes:
        _share(norms, count)


def _share(norms: list[_BatchNorm], count: int) -> None:
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return
    for norm in norms:
        total = torch.tensor(float(count), device=norm.running_mean.device)
        for statistic in (norm.running_mean, norm.running_var):
            statistic.mul_(count)
            group.all_reduce(statistic)
        group.all_reduce(total)
        norm.running_mean.div_(total)
        norm.running_var.div_(total)
        norm.num_batches_tracked.fill_(int(total))
