"""What the processes of torch.distributed's default group tell each other after a pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def in_processes() -> bool:
    """Whether there is a group of more than one process."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def on_main_process() -> bool:
    """Whether this process speaks for all of torch.distributed's default group; true if there is none."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


def told_by_all(mine: Any) -> list[Any]:  # noqa: ANN401 - whatever can be pickled
    """Give what every process says, by rank."""
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine)
    return told


def added_up(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Add the tensors of all processes by name. A process that lacks a name adds nothing to it.

    Args:
        state: This process's tensors.
        device: Where the model lies: NCCL adds on the GPU, gloo on the host.

    Returns:
        The sums, on the CPU, by name in sorted order.
    """
    known = {
        name: plan
        for one in told_by_all({name: (tensor.shape, tensor.dtype) for name, tensor in state.items()})
        for name, plan in one.items()
    }
    place = device if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    sums: dict[str, Tensor] = {}
    for dtype in sorted({dtype for _, dtype in known.values()}, key=str):
        names = sorted(name for name, plan in known.items() if plan[1] == dtype)
        parts = [
            state[name].to(place) if name in state else torch.zeros(known[name][0], dtype=dtype, device=place)
            for name in names
        ]
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat)
        pieces = flat.cpu().split([part.numel() for part in parts])
        sums |= {name: piece.view(known[name][0]).clone() for name, piece in zip(names, pieces, strict=True)}
    return sums
