import random
from pathlib import Path

import numpy as np
import pytest
import torch

import remos_hf
from remos_hf.randomness import own_randomness, seeded


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


def test_a_seeded_block_draws_from_its_seed_and_leaves_no_trace():
    torch.manual_seed(0)
    expected = torch.rand(2).tolist(), torch.rand(2).tolist()
    torch.manual_seed(0)
    first = torch.rand(2).tolist()
    with seeded(5):
        assert torch.rand(2).tolist() == torch.rand(2, generator=torch.Generator().manual_seed(5)).tolist()
    assert (first, torch.rand(2).tolist()) == expected


def test_a_block_without_devices_starts_none():
    if torch.cuda.is_available():
        pytest.skip("CUDA may be in use already")
    with seeded(5), own_randomness(3):
        assert not torch.cuda.is_initialized()


def test_devices_that_are_no_gpus_need_no_state_of_their_own():
    with seeded(5, devices=[torch.device("cpu"), torch.device("meta")]):
        one = torch.rand(1)
    with seeded(5, devices=[]):
        assert torch.equal(torch.rand(1), one)


def test_no_other_file_forks_the_random_state():
    package = Path(remos_hf.__file__).parent
    forking = [
        path.name
        for path in package.rglob("*.py")
        if any("fork_rng(" in line and "fork_rng(devices=[])" not in line for line in path.read_text().splitlines())
    ]
    assert forking == ["randomness.py"]
