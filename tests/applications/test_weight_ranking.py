import pytest
import torch

from remos_hf.applications.weight_ranking import highest_scoring, weight_scores
from remos_hf.errors import LayerMismatchError, NonFiniteError
from remos_hf.profiling.reference import profile_reference
from remos_hf.slicing.contributions import contributions
from tests import tiny


def setting():
    model, batches = tiny.ConvNet().eval(), tiny.image_batches(2)
    return model, batches, profile_reference(model, batches)


@pytest.mark.parametrize("method", ["contributions", "gradient", "effective_path", "magnitude", "random"])
def test_every_method_scores_every_weight_that_runs(method):
    model, batches, reference = setting()
    scores = weight_scores(model, method, batches, reference=reference)
    assert {name: one.shape for name, one in scores.items()} == {
        name: one.shape for name, one in model.named_parameters() if one.dim() > 1
    }
    assert all(one.dtype == torch.float64 and int(one.min()) >= 0 for one in scores.values())


def test_contributions_are_the_absolute_ones_of_the_outputs_asked_about():
    model, batches, reference = setting()
    scores = weight_scores(model, "contributions", batches, reference=reference, outputs=1)
    found = contributions(model, batches, reference, outputs=1)
    assert all(torch.equal(one, found.absolute[name].double()) for name, one in scores.items())


def test_random_draws_each_place_once_and_by_the_seed():
    model = tiny.ConvNet().eval()
    one, again, other = (weight_scores(model, "random", seed=seed) for seed in (0, 0, 1))
    for name, score in one.items():
        assert sorted(score.flatten().tolist()) == list(range(score.numel()))
        assert torch.equal(score, again[name])
    assert not torch.equal(one["conv.weight"], other["conv.weight"])


@pytest.mark.parametrize("method", ["contributions", "magnitude", "random"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_every_layer_gives_its_share_and_none_that_stays_scores_higher(method, share):
    model, batches, reference = setting()
    scores = weight_scores(model, method, batches, reference=reference)
    taken = highest_scoring(model, scores, share, head=("head",)).kept
    assert "head.weight" not in taken
    for name, one in taken.items():
        assert int(one.sum()) == round(share * one.numel())
        if not bool(one.all()) and bool(one.any()):
            assert float(scores[name][one].min()) >= float(scores[name][~one].max())


def test_of_equal_scores_the_largest_weights_are_taken():
    model = tiny.ConvNet().eval()
    equal = {name: torch.zeros_like(one) for name, one in weight_scores(model, "magnitude").items()}
    by_size = highest_scoring(model, weight_scores(model, "magnitude"), 0.3, head=())
    assert highest_scoring(model, equal, 0.3, head=()).kept == by_size.kept


def test_channels_go_whole_by_their_mean():
    model = tiny.ConvNet().eval()
    scores = weight_scores(model, "magnitude")
    taken = highest_scoring(model, scores, 0.5, granularity="channel", head=()).kept
    for name, one in taken.items():
        channels = one.flatten(1)
        assert bool((channels.all(1) | ~channels.any(1)).all())
        assert int(channels.all(1).sum()) == max(1, round(0.5 * len(channels)))
        means = scores[name].flatten(1).mean(1)
        assert float(means[channels.all(1)].min()) >= float(means[~channels.all(1)].max())


def test_wrong_input_is_refused():
    model, batches, _ = setting()
    with pytest.raises(ValueError, match="method is one of"):
        weight_scores(model, "taylor")
    with pytest.raises(ValueError, match="looks at samples"):
        weight_scores(model, "effective_path")
    with pytest.raises(ValueError, match="reference"):
        weight_scores(model, "gradient", batches)
    scores = weight_scores(model, "magnitude")
    with pytest.raises(ValueError, match="share"):
        highest_scoring(model, scores, 0.0)
    with pytest.raises(ValueError, match="granularity"):
        highest_scoring(model, scores, 0.5, granularity="filter")
    with pytest.raises(LayerMismatchError, match="shape"):
        highest_scoring(model, {**scores, "conv.weight": torch.zeros(2, 2)}, 0.5)
    with pytest.raises(LayerMismatchError, match="none of the layers"):
        highest_scoring(model, {"other.weight": torch.zeros(2, 2)}, 0.5)
    with pytest.raises(NonFiniteError, match="conv"):
        highest_scoring(model, {**scores, "conv.weight": torch.full((8, 8, 3, 3), float("nan"))}, 0.5)
