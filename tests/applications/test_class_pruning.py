import copy

import pytest
import torch
from torch import nn

from remos_hf.applications.class_pruning import fine_tune_pruned, keep_pruned, prune_outside
from remos_hf.applications.mean_inputs import profile_mean_inputs
from remos_hf.applications.weight_ranking import highest_scoring, weight_scores
from remos_hf.errors import LayerMismatchError, TeacherMismatchError
from remos_hf.profiling.reference import profile_reference
from tests import tiny


def setting(share=0.5, **options):
    model = tiny.ConvNet().eval()
    return model, highest_scoring(model, weight_scores(model, "magnitude"), share, head=("head",), **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)


def test_what_is_outside_is_zero_and_all_else_is_as_it_was():
    model, kept = setting()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    prune_outside(model, kept)
    for name, now in model.state_dict().items():
        wanted = before[name] * kept.kept[name] if name in kept.kept else before[name]
        assert torch.equal(now, wanted), name


def test_means_change_biases_and_norms_alone():
    model, kept = setting()
    plain, meant = copy.deepcopy(model), copy.deepcopy(model)
    prune_outside(plain, kept)
    prune_outside(meant, kept, means=profile_mean_inputs(model, tiny.image_batches()))
    other = {name for name, one in plain.state_dict().items() if not torch.equal(one, meant.state_dict()[name])}
    assert other == {"norm.running_mean", "conv.bias", "down.bias", "depthwise.bias", "grouped.bias"}


def test_a_linear_chain_pruned_with_means_is_right_on_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).eval()
    samples = torch.randn(50, 5) + 1
    kept = highest_scoring(model, weight_scores(model, "random"), 0.3, head=())
    after = prune_outside(copy.deepcopy(model), kept, means=profile_mean_inputs(model, [samples]))
    assert torch.allclose(model(samples).mean(0), after(samples).mean(0), atol=1e-5)


def test_what_is_pruned_stays_zero_while_the_rest_trains():
    model, kept = setting()
    prune_outside(model, kept)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    samples = [(image, int(place % 4)) for place, image in enumerate(torch.randn(12, 3, 8, 8))]
    fitted = fine_tune_pruned(model, kept, samples, optimizer=sgd, epochs=2, batch_size=4, progress=False)
    assert fitted.steps == 6
    for name, bits in kept.kept.items():
        now = model.state_dict()[name]
        assert not now[~bits].any()
        assert not torch.equal(now, before[name])


def test_an_optimizer_of_another_model_is_refused():
    _, kept = setting()
    other = tiny.mlp()
    with pytest.raises(LayerMismatchError):
        keep_pruned(sgd(other), other, kept)


def test_a_model_that_was_changed_since_is_refused_before_anything_is_written():
    model, kept = setting()
    model.stem.weight.data[0] += 1
    before = model.conv.weight.clone()
    with pytest.raises(TeacherMismatchError):
        prune_outside(model, kept)
    assert torch.equal(model.conv.weight, before)


def test_a_class_that_uses_one_branch_keeps_that_branch():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) + 0.01)
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[5.0, 5, 0.01, 0.01], [0.01, 0.01, 5, 5]]))
    samples = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    reference = profile_reference(model, [samples])
    for label, rows in ((0, [0, 1]), (1, [2, 3])):
        scores = weight_scores(model, "contributions", [samples], reference=reference, outputs=label)
        kept = highest_scoring(model, scores, 0.125, head=("2",)).kept["0.weight"]
        assert kept.nonzero()[:, 0].unique().tolist() == rows
