import numpy as np
import pytest
import torch
from torch import nn

from remos_hf.errors import NonFiniteError
from remos_hf.layers import sliceable_layers
from remos_hf.slicing.magnitude_table import MagnitudeTable, magnitudes_of


def layers_of(dtype=torch.float32, scale=1.0, size=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 7))
    for parameter in model.parameters():
        parameter.data.normal_(std=scale)
    return list(sliceable_layers(model.to(dtype)).values())


def filled(layers, shard=None):
    table = MagnitudeTable.sized_for(layers)
    for layer in layers if shard is None else shard:
        table.add(magnitudes_of(layer.weight).flatten())
    return table


def test_tables_of_shards_add_up_to_the_table_of_the_whole():
    layers = layers_of()
    tables = [filled(layers, shard) for shard in (layers, layers[:1], layers[1:])]
    for table in tables:
        table.close()
    assert torch.equal(tables[0].counts, tables[1].counts + tables[2].counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-36])
@pytest.mark.parametrize("ties_share", [True, False])
def test_the_doubled_rank_of_every_weight_lies_between_the_ends_of_its_bin(dtype, scale, ties_share):
    layers = layers_of(dtype, scale)
    table = filled(layers)
    table.close(ties_share=ties_share)
    values = torch.cat([magnitudes_of(layer.weight).flatten() for layer in layers])
    ordered = np.sort(values.numpy())
    below = np.searchsorted(ordered, values.numpy())
    equal = np.searchsorted(ordered, values.numpy(), side="right") - below
    bins = table.bin_of(values)
    lowest, highest = table.lowest[bins].numpy(), table.highest[bins].numpy()
    if ties_share:
        ranks = 2 * below + equal - 1
        assert ((lowest <= ranks) & (ranks <= highest)).all()
    else:
        assert ((lowest <= 2 * below) & (2 * (below + equal - 1) <= highest)).all()
    assert int(table.counts.sum()) == len(values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_counted(bad):
    layers = layers_of()
    layers[1].weight[0, 0] = bad
    with pytest.raises(NonFiniteError, match="'1.weight'"):
        MagnitudeTable.sized_for(layers)


def test_magnitudes_are_no_view_of_the_weights():
    for dtype in (torch.float32, torch.float16):
        weight = torch.tensor([-1.0, 2.0], dtype=dtype)
        magnitudes_of(weight).zero_()
        assert weight.tolist() == [-1, 2]
