"""The random state of Python, NumPy and torch, lent to a block and given back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Give a block its own randomness, so that strategies are compared from the same random state.

    Args:
        seed: Seed of the state that the block finds; at least 0. None: the present state, which comes back afterwards,
            so that several blocks, one after another, draw what the next caller will draw.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others use
    try:
        with torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
