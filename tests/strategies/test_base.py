import dataclasses
import json

import pytest
import torch

from remos_hf.profiling.tokens import seen_tokens
from remos_hf.slicing.refill import reset_unseen_rows
from remos_hf.slicing.relevant_slice import RelevantSlice, choose_slice
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.base import Hold, Preparation, Strategy, share_by_group
from remos_hf.strategies.slice_and_reset import SliceAndReset
from remos_hf.strategies.student_data import StudentData
from tests import tiny

SLICING = {name for name, kind in STRATEGIES.items() if issubclass(kind, SliceAndReset)}


def make(name):
    named = {one.name for one in dataclasses.fields(STRATEGIES[name])}
    values = {"slice_ratio": 0.9, "steps": 2, "head_steps": 2, "mask_token": 2, "k": 2}
    return STRATEGIES[name](**{key: value for key, value in values.items() if key in named})


@pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore:.*weights tie at the:UserWarning")
@pytest.mark.parametrize("name", STRATEGIES)
class TestContractOfEveryStrategy:
    def test_its_description_is_json_that_makes_it_again(self, name):
        described = json.loads(json.dumps(make(name).to_dict()))
        kind = described.pop("name")
        assert {cls.__name__: cls for cls in STRATEGIES.values()}[kind](**described) == make(name)

    def test_the_same_seed_starts_the_same_student(self, name):
        def start():
            student = tiny.bert()
            make(name).prepare(student, tiny.student_data())
            return student.state_dict()

        one, two = start(), start()
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_hooks_are_gone_and_the_mode_is_kept(self, name, no_hooks_left):
        student = tiny.bert().train()
        no_hooks_left(student)
        make(name).prepare(student, tiny.student_data())
        assert student.training

    def test_it_takes_the_seed_of_the_run_unless_it_names_one(self, name):
        strategy = make(name)
        if any(one.name == "seed" for one in dataclasses.fields(strategy)):
            assert strategy.seed is None and strategy.with_seed(7).seed == 7
            assert dataclasses.replace(strategy, seed=3).with_seed(7).seed == 3
        else:
            assert strategy.with_seed(7) is strategy


def test_a_hold_does_nothing_by_default():
    hold, inputs = Hold(), {"input_ids": 1}
    assert hold.loss(None, inputs, lambda given: (given, "outputs")) == (inputs, "outputs")
    assert hold.begin(None, None) is None and hold.after_step(None) is None
    assert hold.finish(None, None) is None
    assert hold.state_dict() == {}
    assert hold.load_state_dict({}) is None


def test_a_strategy_that_overrides_hold_holds():
    class Holding(Strategy):
        def hold(self, student, teacher):
            return Hold()

    assert Holding().holds
    assert not Strategy().holds
    assert Strategy().hold(None, None) is None


def test_shares_are_grouped_by_block():
    kept = {
        "bert.encoder.layer.0.a.weight": torch.tensor([[True, True]]),
        "bert.encoder.layer.0.b.weight": torch.tensor([[False, False]]),
        "bert.encoder.layer.1.a.weight": torch.tensor([[True]]),
        "stem.weight": torch.tensor([[False]]),
    }
    assert share_by_group(RelevantSlice(kept, 0.5)) == {
        "bert.encoder.layer.0": 0.5,
        "bert.encoder.layer.1": 1,
        "stem": 0,
    }


def test_the_summary_says_what_was_kept_and_where():
    relevant = choose_slice(tiny.bert(), slice_ratio=0.9, rule="top_magnitude")
    summary = Preparation(None, relevant, {"choose": 0.25}).summary()
    assert f"Kept {relevant.num_kept:,} of {relevant.num_weights:,} weights" in summary
    assert "bert.encoder.layer.1" in summary
    assert "choose 0.2 s" in summary
    assert Preparation().summary() == ""


def test_the_summary_says_which_squares_and_rows_were_given_up():
    relevant = choose_slice(tiny.bert(), slice_ratio=0.9, rule="top_magnitude")
    summary = Preparation(None, relevant, {"choose": 0.25}, squares_reset=0.42, rows_reset=1234).summary()
    assert "The weights given up hold 42% of the squares." in summary
    assert summary.endswith("Reset 1,234 embedding rows of tokens that the data never shows.")
    assert "embedding rows" not in Preparation(None, relevant, {}, 0.42).summary()
    assert Preparation(rows_reset=2).summary() == "Reset 2 embedding rows of tokens that the data never shows."


ROWS = {name: kind for name, kind in STRATEGIES.items() if name in SLICING or name == "finetune"}


def with_rows(name, **options):
    return dataclasses.replace(make(name), **options)


@pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore:.*weights tie at the:UserWarning")
@pytest.mark.parametrize("name", ROWS)
class TestEmbeddingRows:
    def test_they_stay_by_default(self, name):
        student = tiny.bert()
        assert with_rows(name).prepare(student, tiny.student_data()).rows_reset == 0
        assert torch.equal(student.get_input_embeddings().weight, tiny.bert().get_input_embeddings().weight)

    def test_those_of_tokens_that_the_data_never_show_are_reset_when_asked(self, name):
        student, by_hand = tiny.bert(), tiny.bert()
        asked = []

        def batches(samples):
            asked.append(samples)
            return tiny.text_batches()

        done = with_rows(name, embedding_rows="mean").prepare(student, StudentData(batches))
        expected = reset_unseen_rows(by_hand, seen_tokens(by_hand, tiny.text_batches()))
        assert done.rows_reset == expected > 0
        assert torch.equal(student.get_input_embeddings().weight, by_hand.get_input_embeddings().weight)
        assert asked[-1] is None  # all samples

    def test_a_restart_gives_the_student_that_prepare_gave(self, name):
        strategy = with_rows(name, embedding_rows="mean")
        prepared, again = tiny.bert(), tiny.bert()
        done = strategy.prepare(prepared, tiny.student_data())
        strategy.restart(again, tiny.student_data(), done.relevant_slice)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in prepared.state_dict().items())

    def test_another_word_is_refused_when_the_strategy_is_made(self, name):
        with pytest.raises(ValueError, match="'keep' or 'mean', but got 'zero'"):
            with_rows(name, embedding_rows="zero")


def test_a_model_without_token_embeddings_is_refused_when_rows_are_to_be_reset():
    with pytest.raises(TypeError, match="embedding_rows must be 'keep'"):
        with_rows("finetune", embedding_rows="mean").prepare(tiny.vit(), tiny.student_data(tiny.image_batches))
