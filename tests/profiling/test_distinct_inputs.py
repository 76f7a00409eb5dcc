import torch
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.distinct_inputs import InputsFound
from remos_hf.profiling.part_runs import PartRuns
from tests import tiny


def inputs_of(model, batches):
    adapter = adapter_for(model, ())
    with torch.no_grad():
        found = InputsFound(PartRuns(adapter, batches), adapter.layers())
    return found, found.of(adapter.layers())


def names_of(inputs):
    return [[layer.name.rpartition("layer.")[2] for layer in one.layers] for one in inputs]


def test_layers_that_read_one_tensor_stand_together_in_forward_order():
    _, inputs = inputs_of(tiny.bert(), tiny.text_batches(padded=False))
    attention = [f"0.attention.self.{name}" for name in ("query", "key", "value")]
    assert names_of(inputs)[:4] == [
        attention,
        ["0.attention.output.dense"],
        ["0.intermediate.dense"],
        ["0.output.dense"],
    ]
    assert [one.block for one in inputs[:8]] == [0] * 4 + [1] * 4
    assert [one.columns for one in inputs[:4]] == [16, 16, 16, 32]


class Odd(nn.Module):
    """A layer that reads a table, one that runs twice, two that read one tensor at two times, one for some samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(3, 4))
        self.place, self.twice, self.before, self.after, self.rare = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, inputs):
        made = self.place(inputs) + self.place(self.table).mean(0)
        made = self.twice(self.twice(made))
        early = self.before(made)
        made.mul_(2)
        made = early + self.after(made)
        return self.rare(made) if float(inputs.max()) > 5 else made


def test_tables_repeated_calls_changed_tensors_and_rare_layers_are_known():
    batches = [torch.zeros(2, 4), torch.zeros(2, 4), torch.full((2, 4), 9.0)]
    found, inputs = inputs_of(Odd(), batches)
    by_name = {layer.name: one for one in inputs for layer in one.layers}
    assert found.names == {"place", "twice", "before", "after", "rare"}
    assert by_name["place"].tables == {1} and not by_name["twice"].tables
    assert by_name["place"].ends is None and by_name["before"].ends == {"before": 1}
    assert by_name["before"] is not by_name["after"]


def test_only_as_many_batches_are_read_as_show_every_layer():
    class Counted(list):
        read = 0

        def __getitem__(self, place):
            Counted.read += 1
            return super().__getitem__(place)

    inputs_of(tiny.mlp(), Counted([torch.randn(2, 5)] * 9))
    assert not Counted.read
