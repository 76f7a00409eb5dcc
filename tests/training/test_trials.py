import pytest
import torch

from remos_hf.strategies.plain import Finetune
from remos_hf.training.profiling_data import trainer_data
from remos_hf.training.ratio_search import RatioSearch
from remos_hf.training.trials import Trials, check_searchable
from tests.training.runs import trainer


def test_a_trial_trains_the_copy_that_it_is_given_and_shows_it_afterwards(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune())
    trials = Trials(ours, RatioSearch(), trainer_data(ours), lambda model: model)
    trials.rehearse()
    before = ours.model.classifier.weight.clone()
    other = type(ours.model)(ours.model.config)
    seen = trials.run(Finetune(), "plain", 1.0, other, lambda trial: trial.model.classifier.weight.detach().clone())
    assert torch.equal(ours.model.classifier.weight, before)
    assert (seen.found - other.classifier.weight).abs().max() < 0.1 < (seen.found - before).abs().max() + 0.09
    assert not torch.equal(seen.found, other.classifier.weight) and seen.steps == 2
    assert seen.told().startswith(f"plain {seen.accuracy:.4f} [")


def test_what_cannot_be_searched_is_refused_in_the_words_that_were_asked(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune())
    ours.eval_dataset = None
    with pytest.raises(ValueError, match="^energy='auto' compares accuracies on held-out clean data, so it needs"):
        check_searchable(ours, "energy='auto'")
