import pytest
import torch

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError
from remos_hf.profiling.coverage_counts import CoverageCounts
from remos_hf.profiling.criteria import top_k_coverage
from remos_hf.profiling.observers import Activation, Padding, Slot
from tests import tiny


@pytest.fixture
def counts():
    counts = CoverageCounts(top_k_coverage(1))
    counts.start(adapter_for(tiny.mlp(), ()).layers())
    return counts


def see(counts, slot, values, real=None):
    activation = Activation(False, None if real is None else Padding(real), True, values.shape[1])
    activation.hold(values, values)
    counts.see(slot, activation)
    activation.hold(None, None)


def test_calls_of_a_module_cover_a_sample_once(counts):
    for _ in range(2):
        see(counts, Slot("0", "input"), torch.eye(5)[None, :1])
    counts.close_batch()
    assert counts.state()["input:0"].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_dropped_batch_is_not_counted(counts):
    see(counts, Slot("0", "input"), torch.eye(5)[None, :1])
    counts.drop_batch()
    counts.close_batch()
    assert counts.state() == {}


def test_counts_are_int64_and_pass_what_int32_holds(counts):
    see(counts, Slot("0", "input"), torch.eye(5)[None, :1])
    counts.close_batch()
    state = {key: value * 2**40 for key, value in counts.state().items()}
    counts.set_state(state)
    see(counts, Slot("0", "input"), torch.eye(5)[None, :1])
    counts.close_batch()
    assert counts.state()["input:0"][0] == 2**40 + 1


def test_nan_at_padding_alone_is_no_fault_and_at_a_real_position_it_is_named(counts):
    values, real = torch.eye(5)[None, :2].clone(), torch.tensor([[True, False]])
    values[0, 1, 3] = float("nan")
    see(counts, Slot("0", "input"), values, real)
    counts.close_batch()
    assert counts.state()["input:0"].tolist() == [1, 0, 0, 0, 0, 0]
    values[0, 0, 2] = float("nan")
    see(counts, Slot("0", "input"), values, real)
    counts.close_batch()
    with pytest.raises(NonFiniteError, match=r"input of '0' \(weight '0.weight'\) held NaN"):
        counts.check_finite()
