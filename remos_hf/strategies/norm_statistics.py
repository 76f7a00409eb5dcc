"""The statistics of batch norms, taken anew after weights were swapped."""

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from remos_hf.activations import evaluating, watch_calls
from remos_hf.adapters.base import Adapter
from remos_hf.profiling.batches import count_samples
from remos_hf.profiling.part_runs import PartRuns
from remos_hf.profiling.processes import in_processes, on_main_process

logger = logging.getLogger(__name__)


def has_norm_statistics(model: nn.Module) -> bool:
    """Whether a model has a batch norm that keeps a running mean and variance."""
    return bool(_norms_of(model))


def _norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]


@torch.no_grad()
def redo_norm_statistics(adapter: Adapter, batches: Iterable, *, dropout: bool = False) -> None:
    """Take the running mean and variance of every batch norm anew: the mean over batches, of all processes.

    Everything else runs in eval mode. Without batch norms nothing is read. A batch of one sample that gives a norm a
    single value a channel, which has no variance, is left out; if there are only such, the statistics stay as they are.

    Args:
        adapter: Of the model; its modes are put back.
        batches: This process's share of the data.
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
    before = [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]
    count = 0
    try:
        with evaluating(adapter.model):
            adapter.model.train(dropout)
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the cumulative mean
            for batch in (send_to_device(one, device) for one in batches):
                if count_samples(batch) > 1 or _has_variance(adapter, norms, batch):
                    adapter.forward(batch)
                    count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not _share(norms, count):
        logger.warning("The norm statistics stay as they are: no batch holds two values of a channel.")
        for norm, held in zip(norms, before, strict=True):
            norm.load_state_dict({**norm.state_dict(), **held})


def _has_variance(adapter: Adapter, norms: list[_BatchNorm], batch: Any) -> bool:  # noqa: ANN401 - any batch
    found: list[bool] = []

    def see(_: str, args: tuple, *__: object) -> None:
        found.append(args[0].numel() > args[0].shape[1])

    with evaluating(adapter.model), watch_calls({str(place): norm for place, norm in enumerate(norms)}, see):
        adapter.forward(batch)
    return all(found)


@torch.no_grad()
def fit_norm_statistics(runs: PartRuns) -> None:
    """Set the running mean and variance of every batch norm to those of what it is given, over all samples.

    Norm after norm in the order in which they run, each on what the ones before it now give: neither the order of the
    samples nor how they are cut into batches changes more than rounding. A norm that does not run, or is given a single
    value a channel, keeps what it has.

    Args:
        runs: Of the model, held in eval mode, from its first block on.
    """
    norms = {name: one for name, one in runs.adapter.model.named_modules() if one in set(_norms_of(runs.adapter.model))}
    if not norms or not runs.batches:
        return
    calls: dict[str, int] = {}

    def count(name: str, *_: object) -> None:
        calls[name] = calls.get(name, 0) + 1

    with watch_calls(norms, count):
        runs.adapter.forward(runs.batches[0])
    for name, times in tqdm(calls.items(), desc="Norm statistics", delay=2, disable=not on_main_process()):
        block = next((place for place, one in enumerate(runs.blocks) if name.startswith(f"{one}.")), 0)
        while runs.through < block:
            runs.pass_block()
        norm, values, sums, squares = norms[name], 0, 0.0, 0.0
        for place in range(len(runs.batches)):
            for given in runs.given_to(name, norm, place, times):
                channels = given.double().transpose(0, 1).flatten(1)
                values += channels.shape[1]
                sums, squares = sums + channels.sum(1), squares + (channels**2).sum(1)
        if values > 1:
            mean = sums / values
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares - values * mean**2).clamp(min=0) / (values - 1))


def _share(norms: list[_BatchNorm], count: int) -> int:
    """Take the mean over the batches of all processes; give how many there are."""
    group = torch.distributed
    if not in_processes():
        return count
    batches = torch.tensor(float(count), device=norms[0].running_mean.device)
    group.all_reduce(batches)
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.mul_(count)
            group.all_reduce(statistic)
            statistic.div_(batches)
        norm.num_batches_tracked.fill_(int(batches))
    return int(batches)
