import torch
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.strategies.norm_statistics import has_norm_statistics, redo_norm_statistics
from tests import tiny


def test_they_are_the_mean_over_batches_without_dropout():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    net[0](torch.ones(1))
    batches = [(torch.randn(4, 3), None) for _ in range(3)]
    redo_norm_statistics(adapter_for(net, ()), batches)
    assert torch.allclose(net[1].running_mean, torch.stack([one.mean(0) for one, _ in batches]).mean(0))
    assert torch.allclose(net[1].running_var, torch.stack([one.var(0) for one, _ in batches]).mean(0))
    assert net.training and net[1].momentum == 0.1 and net[1].training


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
