import copy

import pytest
import torch
from torch import nn

from remos_hf.activations import watch_calls
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.part_runs import PartRuns
from remos_hf.strategies.norm_statistics import fit_norm_statistics, has_norm_statistics, redo_norm_statistics
from tests import tiny


def test_they_are_the_mean_over_batches_without_dropout():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    net[0](torch.ones(1))
    batches = [(torch.randn(4, 3), None) for _ in range(3)]
    redo_norm_statistics(adapter_for(net, ()), batches)
    assert torch.allclose(net[1].running_mean, torch.stack([one.mean(0) for one, _ in batches]).mean(0))
    assert torch.allclose(net[1].running_var, torch.stack([one.var(0) for one, _ in batches]).mean(0))
    assert net.training and net[1].momentum == 0.1 and net[1].training


def test_a_batch_of_one_value_a_channel_is_left_out_and_alone_it_leaves_the_statistics():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    several, one = torch.randn(4, 3), torch.randn(1, 3)
    redo_norm_statistics(adapter_for(net, ()), [(several, None), (one, None)])
    assert torch.allclose(net[0].running_mean, several.mean(0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    redo_norm_statistics(adapter_for(net, ()), [(one, None), (one + 1, None)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_one_image_has_many_values_a_channel():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    images = torch.randn(2, 3, 4, 4)
    redo_norm_statistics(adapter_for(net, ()), [(one[None], None) for one in images])
    assert torch.allclose(net[0].running_mean, images.mean((0, 2, 3)), atol=1e-6)


def fitted(net, *batches):
    net = copy.deepcopy(net).eval()
    fit_norm_statistics(PartRuns(adapter_for(net, ()), list(batches)))
    return net


def test_fitted_statistics_are_those_of_all_that_each_norm_is_given():
    data = torch.cat([batch[0] for batch in tiny.image_batches()])
    net = fitted(tiny.ConvNet(), (data, None))
    given = {}

    def see(name, args, *_):
        given[name] = args[0]

    norms = {name: one for name, one in net.named_modules() if isinstance(one, nn.BatchNorm2d)}
    with watch_calls(norms, see), torch.no_grad():
        net(data)
    assert len(given) == len(norms)
    for name, norm in norms.items():
        torch.testing.assert_close(norm.running_mean, given[name].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, given[name].var((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [[12], [11, 1], [1] * 12, [5, 5, 2]])
def test_neither_the_cut_nor_the_order_changes_fitted_statistics(cut):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    data = torch.randn(12, 4) * torch.arange(1, 13)[:, None]
    whole = fitted(net, (data, None)).state_dict()
    order = torch.randperm(12)
    for name, value in fitted(net, *((one, None) for one in data[order].split(cut))).state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_a_norm_that_does_not_run_keeps_what_it_has():
    net = tiny.ConvNet()
    net.unused = nn.BatchNorm2d(3)
    net.unused.running_mean.fill_(7)
    assert float(fitted(net, tiny.image_batches()[0]).unused.running_mean[0]) == 7


def test_a_model_without_batch_norms_reads_nothing():
    redo_norm_statistics(adapter_for(tiny.bert()), iter_fails())


def test_dropout_acts_if_asked_for_and_the_modes_come_back():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    batches = [(torch.ones(64, 3), None)]
    redo_norm_statistics(adapter_for(net, ()), batches, dropout=True)
    assert net[1].running_var.min() > 0.5 and not net.training and not net[0].training
    assert has_norm_statistics(net) and not has_norm_statistics(nn.BatchNorm1d(3, track_running_stats=False))


def iter_fails():
    raise AssertionError("read the data")
    yield
