import pytest
import torch
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.part_runs import PartRuns
from tests import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def inputs_of(runs, layers, ends=None, place=1):
    seen = {}

    def see(read):
        if read.end == "input":
            seen[read.layer.name] = read.values.clone()

    runs.read(place, runs.taps(layers), see, ends)
    return seen


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.llama, tiny.bloom])
def test_layers_behind_a_block_that_is_through_read_what_they_read_in_a_whole_run(make):
    adapter = adapter_for(make())
    runs = PartRuns(adapter, tiny.text_batches(padded=False))
    later = {name: layer for name, layer in adapter.layers().items() if name.startswith(runs.blocks[1])}
    whole = inputs_of(runs, later)
    runs.pass_block()
    ran = []
    handle = next(iter(adapter.layers().values())).module.register_forward_hook(lambda *_: ran.append(1))
    part = inputs_of(runs, later)
    handle.remove()
    assert runs.through == 1 and not ran
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_run_ends_when_all_that_was_looked_at_has_run():
    adapter = adapter_for(tiny.bert())
    runs = PartRuns(adapter, tiny.text_batches(padded=False))
    names = list(adapter.layers())[:2]
    ran = []
    last = adapter.layers()["bert.encoder.layer.1.output.dense"].module
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    assert inputs_of(runs, {name: adapter.layers()[name] for name in names}, dict.fromkeys(names, 1)).keys() == {*names}
    assert not ran
    inputs_of(runs, {name: adapter.layers()[name] for name in names})
    handle.remove()
    assert ran


class Blocks(nn.Module):
    """Blocks that write into what they read; with `both`, the outputs of two of them are read further on."""

    def __init__(self, both=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(3)])
        self.last, self.both = nn.Linear(4, 2), both

    def get_classifier(self):
        return self.last

    def reset_classifier(self, num_classes):
        raise NotImplementedError

    def forward(self, images):
        made, kept = images.mean((2, 3)).repeat(1, 2)[:, :4], []
        for block in self.blocks:
            made = block(made)
            kept.append(made.clone())
        return self.last(kept[0] + kept[1] if self.both else made)


@pytest.mark.parametrize("both", [False, True])
def test_blocks_whose_outputs_are_read_further_on_are_not_left_out(both):
    adapter = adapter_for(Blocks(both).eval())
    runs = PartRuns(adapter, [batch for batch, _ in tiny.image_batches()])
    last = {"blocks.2.1": adapter.layers()["blocks.2.1"]}
    whole = inputs_of(runs, last)
    runs.pass_block()
    runs.pass_block()
    part = inputs_of(runs, last)
    assert torch.equal(whole["blocks.2.1"], part["blocks.2.1"])
    assert torch.equal(inputs_of(runs, last)["blocks.2.1"], part["blocks.2.1"])
    assert bool(runs._made) is not both


def test_a_model_without_known_blocks_runs_whole():
    adapter = adapter_for(tiny.mlp(), ())
    runs = PartRuns(adapter, [torch.randn(3, 5)] * 2)
    runs.pass_block()
    assert runs.blocks == () and inputs_of(runs, adapter.layers()).keys() == {"0", "2", "4"}
