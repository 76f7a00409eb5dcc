"""The random state of Python, NumPy and torch, lent to a block and given back. The only file that forks it."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int | None, devices: Iterable[torch.device | int] | None = None) -> Iterator[None]:
    """Give a block torch's randomness from a seed; the state that the caller finds afterwards is the one before.

    Args:
        seed: Seed of the state that the block finds. None: the present state.
        devices: CUDA devices whose state is lent too, beside the CPU's. None: those that this process uses already, so
            that none is started for it.
    """
    numbers = _devices_in_use() if devices is None else _cuda_numbers(devices)
    with torch.random.fork_rng(devices=numbers):
        if seed is not None:
            # Not torch.manual_seed: it would reach devices whose state does not come back.
            torch.default_generator.manual_seed(seed)
            for number in numbers:
                torch.cuda.default_generators[number].manual_seed(seed)
            if torch.backends.mps.is_available():
                torch.mps.manual_seed(seed)
        yield


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Give a block its own randomness, so that strategies are compared from the same random state.

    Args:
        seed: Seed of the state that the block finds; at least 0. None: the present state, which comes back afterwards,
            so that several blocks, one after another, draw what the next caller will draw.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others use
    try:
        with seeded(seed):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _devices_in_use() -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    here = torch.cuda.current_device()
    return [
        number for number in range(torch.cuda.device_count()) if number == here or torch.cuda.memory_reserved(number)
    ]


def _cuda_numbers(devices: Iterable[torch.device | int]) -> list[int]:
    found = [torch.device("cuda", one) if isinstance(one, int) else torch.device(one) for one in devices]
    here = [torch.cuda.current_device() if one.index is None else one.index for one in found if one.type == "cuda"]
    return sorted(set(here))
