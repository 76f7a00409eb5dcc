from types import SimpleNamespace

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Remos
from remos_hf.training.profiling_data import samples_to_look_at, student_batches, trainer_data
from tests import tiny
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


def tokens(batches):
    return [row[row != 0].tolist() for batch in batches for row in batch["input_ids"]]


@pytest.fixture
def finetuner(tmp_path):
    return trainer(tmp_path, strategy=Finetune(), train_dataset=tiny.dataset(10))


def test_batches_hold_every_sample_once_in_order(finetuner):
    assert tokens(student_batches(finetuner)) == [row["input_ids"] for row in tiny.dataset(10)]


def test_reading_the_batches_leaves_the_global_random_state_alone(finetuner):
    state = torch.random.get_rng_state()
    list(student_batches(finetuner, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_max_samples_are_drawn_from_the_whole_data_by_the_seed(finetuner):
    drawn = tokens(student_batches(finetuner, 4))
    everything = [row["input_ids"] for row in tiny.dataset(10)]
    assert len(drawn) == 4
    assert drawn != everything[:4]
    assert all(row in everything for row in drawn)
    assert drawn == tokens(student_batches(finetuner, 4))


@pytest.mark.parametrize("samples", [None, 7])
def test_the_shares_of_processes_are_the_batches_of_one(finetuner, monkeypatch, samples):
    whole = tokens(student_batches(finetuner, samples))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(type(finetuner.args), "process_index", rank)
        monkeypatch.setattr(type(finetuner.args), "world_size", 3)
        shares += tokens(student_batches(finetuner, samples))
    assert sorted(shares) == sorted(whole)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny.dataset(10))


def test_a_stream_is_profiled_too(tmp_path):
    ours = trainer(tmp_path, strategy=Remos(0.9, max_samples=6), train_dataset=Stream(), options={"max_steps": 1})
    ours.train()
    assert ours.profile.num_samples == 6
    known = trainer(tmp_path / "b", slice_ratio=0.9, train_dataset=tiny.dataset(10)[:6], options={"max_steps": 1})
    known.train()
    assert ours.profile == known.profile


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    rows = [{**row, "sentence": "text", "idx": n} for n, row in enumerate(tiny.dataset(8))]
    ours = trainer(tmp_path, strategy=Finetune(), train_dataset=datasets.Dataset.from_list(rows))
    assert tokens(student_batches(ours)) == [row["input_ids"] for row in tiny.dataset(8)]


def test_strategies_get_the_trainers_seed_cap_and_number_of_samples(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune(), options={"seed": 5}, max_samples=7, train_dataset=tiny.dataset(10))
    found = trainer_data(ours)
    assert (found.seed, found.max_samples, found.num_samples, found.is_stream) == (5, 7, 10, False)
    ours.train_dataset = Stream()
    assert (trainer_data(ours).num_samples, trainer_data(ours).is_stream) == (None, True)


def test_strategies_get_the_mask_token_of_the_trainers_tokenizer(tmp_path):
    ours = trainer(tmp_path, strategy=Finetune())
    assert trainer_data(ours).mask_token is None
    ours.processing_class = SimpleNamespace(mask_token_id=4)
    assert trainer_data(ours).mask_token == 4


def test_all_samples_are_looked_at_only_when_asked_for():
    assert samples_to_look_at("all") is None
    assert samples_to_look_at(None) > 100
    assert samples_to_look_at(3) == 3
