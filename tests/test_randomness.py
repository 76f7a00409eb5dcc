import random

import numpy as np
import torch

from remos_hf.randomness import own_randomness


def drawn():
    return torch.rand(2).tolist(), random.random(), np.random.random()  # noqa: NPY002 - the state others use


def test_a_seed_gives_the_same_draws_and_leaves_the_callers_state_alone():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    expected = [drawn(), drawn()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    first = drawn()
    with own_randomness(7):
        one = drawn()
    with own_randomness(7):
        assert drawn() == one
    with own_randomness(8):
        assert drawn() != one
    assert [first, drawn()] == expected


def test_without_a_seed_blocks_draw_what_the_caller_will_draw():
    with own_randomness(None):
        one = drawn()
    with own_randomness(None):
        two = drawn()
    assert one == two == drawn()


def test_the_state_comes_back_after_an_exception():
    try:
        with own_randomness(None):
            one = drawn()
            raise KeyError
    except KeyError:
        assert drawn() == one
