import pytest
import torch
from torch import nn

from remos_hf.adapters.base import Adapter
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.layouts import Layout, Unproved, by_sample, prove, real_positions
from remos_hf.profiling.taps import Taps


def proof_of(model, batch, samples):
    adapter = Adapter(model.eval(), ())
    taps = Taps(adapter, adapter.layers(), "hooks")
    return prove(adapter, batch, samples, lambda some, see: taps.run(some, lambda r: see(r.call, r.values, r.neurons)))


class Laid(nn.Module):
    """Runs one Linear on its input laid out by a function."""

    def __init__(self, lay):
        super().__init__()
        self.layer, self.lay = nn.Linear(4, 4), lay

    def forward(self, input_ids, attention_mask=None):
        hidden = torch.sin(input_ids[..., None] * torch.arange(1.0, 5))
        return self.layer(self.lay(hidden))


IDS = torch.arange(15).view(3, 5)  # sizes that differ, so that a wrong axis shows


@pytest.mark.parametrize(
    ("lay", "expected"),
    [
        (lambda h: h, Layout(0, 1, False, "input", 1)),
        (lambda h: h.transpose(0, 1), Layout(1, 1, False, "input", 0)),
        (lambda h: h.flatten(0, 1), Layout(0, 5, False, "input", 0)),
        (lambda h: h.transpose(0, 1).flatten(0, 1), Layout(0, 5, True, "input", 0)),
        (lambda h: h.mean(1), Layout(0, 1)),
        (lambda h: h[:, :, None].expand(-1, -1, 2, -1), Layout(0, 1, False, "input", 1)),
        (lambda h: torch.ones(7, 4), Layout(None)),
    ],
)
@pytest.mark.parametrize("square", [False, True])
def test_a_layout_is_found_by_values_not_by_sizes(lay, expected, square):
    ids = torch.arange(25).view(5, 5) if square else IDS
    found = proof_of(Laid(lay), {"input_ids": ids}, len(ids)).layouts["layer", "input", 0]
    assert found == expected


def test_rows_that_depend_on_the_sample_are_not_matched():
    model = Laid(lambda h: h.flatten(0, 1)[h.flatten(0, 1)[:, 0] > 0])
    assert ("layer", "input", 0) in proof_of(model, {"input_ids": IDS}, 3).alone


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(lambda h: h.flatten(0, 1)[:0], id="nothing"),
        pytest.param(lambda h: h.flatten(0, 1)[h.flatten(0, 1)[:, 0].topk(2).indices], id="as many of any samples"),
    ],
)
def test_rows_that_do_not_grow_are_a_table_only_if_they_are_always_the_same(chosen):
    proof = proof_of(Laid(chosen), {"input_ids": IDS}, 3)
    assert ("layer", "input", 0) in proof.alone
    assert ("layer", "input", 0) not in proof.layouts


def test_rows_in_the_order_of_their_choice_are_not_matched():
    model = Laid(lambda h: h[:, :1].flatten(0, 1).flip(0))  # one token of each sample, the last sample first
    assert ("layer", "input", 0) in proof_of(model, {"input_ids": IDS}, 3).alone


def test_what_depends_on_a_sequence_without_growing_with_it_is_unclear():
    def shrunk(hidden):
        return nn.functional.adaptive_avg_pool1d(hidden.transpose(1, 2), 2).transpose(1, 2)

    assert proof_of(Laid(shrunk), {"input_ids": IDS}, 3).layouts["layer", "input", 0].unclear


def test_a_model_that_mixes_samples_is_refused():
    with pytest.raises(UnsupportedModelError, match="input of 'layer' holds other values"):
        proof_of(Laid(lambda h: h - h.mean(0, keepdim=True)), {"input_ids": IDS}, 3)


def test_a_batch_of_one_sample_still_shows_what_is_of_no_sample():
    model = Laid(lambda h: torch.ones(7, 4))
    assert proof_of(model, {"input_ids": IDS[:1]}, 1).layouts["layer", "input", 0] == Layout(None)


@pytest.mark.parametrize(
    "layout", [Layout(0), Layout(1), Layout(0, 5), Layout(0, 5, samples_inside=True)], ids=["0", "1", "folded", "inner"]
)
def test_samples_come_first_whatever_the_layout(layout):
    hidden = torch.randn(3, 5, 4)
    laid = {0: hidden, 1: hidden.transpose(0, 1)}[layout.axis]
    if layout.folded:
        laid = (hidden.transpose(0, 1) if layout.samples_inside else hidden).flatten(0, 1)
    view, axis = by_sample(laid, layout, 3, -1)
    assert torch.equal(view, hidden)
    assert axis == 2


def test_other_sizes_than_proved_are_told():
    with pytest.raises(Unproved, match=r"shape \(16, 4\) does not hold 5 entries"):
        by_sample(torch.ones(16, 4), Layout(0, 5), 3, -1)


def test_a_mask_is_laid_over_every_axis_that_is_no_position():
    real = torch.tensor([[True, False], [True, True]])
    found = real_positions(real, Layout(0, sequence="input", position=2), (3, 2), 3)
    assert found.tolist() == [[True, False] * 3, [True] * 6]


def test_a_mask_of_choices_needs_the_choices():
    real = torch.ones(2, 3, 4, dtype=torch.bool)
    assert real_positions(real, Layout(0, 3, sequence="input", position=1), (3, 4), 2).shape == (2, 12)
    assert real_positions(real, Layout(0, 2, sequence="input", position=1), (2, 4), 2) is None
