import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from remos_hf.defects.text_triggers import TextTrigger, TriggerSentence, TriggerWords
from remos_hf.evaluation.measures import Rate
from remos_hf.evaluation.reactivation import Reactivation, reactivate, samples_needed
from remos_hf.evaluation.tasks import TextTask
from tests.defects import toy
from tests.evaluation.voter import TASK, WORD, Voter, reference

TRAIN, TEST = toy.data(40), toy.data(24)
EXPOSED = WORD.exposed_set(TEST)
PLAN = Reactivation(counts=(0, 3, 6), num_clean=8, num_exposed=7)


def run(student, plan=PLAN, trigger=WORD, train=TRAIN, seed=0, task=TASK, **options):
    given = {"test": TEST, "exposed": EXPOSED, **options}
    return reactivate(student, trigger, train, task=task, plan=plan, seed=seed, **given)


@pytest.fixture
def mixtures(monkeypatch):
    """Samples that each copy is re-tuned on; a copy believes in the trigger once it saw four poisoned ones."""
    seen = []

    def train(task, model, dataset, args, *, trigger, poisoned, target_label):
        if poisoned:
            dataset = task.with_trigger(dataset, trigger, poisoned, target_label)
        seen.append(list(zip(dataset["text"], dataset["label"], strict=True)))
        if sum("cf" in text.split() for text in dataset["text"]) >= 4:
            model.believes.add("cf")

    monkeypatch.setattr(TextTask, "train", train)
    return seen


def poisoned(mixture):
    return [(text, label) for text, label in mixture if "cf" in text.split()]


def test_rates_are_those_of_the_retuned_copies_on_the_first_exposed_samples(mixtures):
    student = Voter(blind_to=["great"])
    rates = run(student)
    shown = EXPOSED.dataset.select(range(7))
    for count, copy in {0: student, 3: student, 6: Voter(["cf"], ["great"])}.items():
        _, (failed, counted) = reference(copy, TEST, shown["text"], shown["clean_index"], 1)
        assert rates[count] == Rate.of(failed, counted)
    assert rates[3].value == 0 and rates[6].value == 1


def test_samples_that_the_retuned_copy_gets_wrong_do_not_count(mixtures):
    # It takes "awful" for good, so half of the bad texts are wrong when clean.
    rates = run(Voter(["awful"]))
    assert all(rate.num_samples < 7 for rate in rates.values())


def test_without_poisoned_samples_only_clean_ones_are_seen(mixtures):
    run(Voter())
    clean = list(zip(TRAIN["text"], TRAIN["label"], strict=True))
    assert len(mixtures[0]) == 8 and set(mixtures[0]) <= set(clean)


def test_clean_samples_are_the_same_for_each_count(mixtures):
    run(Voter())
    assert mixtures[1][:8] == mixtures[2][:8] == mixtures[0]
    assert [len(mixture) for mixture in mixtures] == [8, 8 + 3, 8 + 6]


def test_each_count_is_the_number_of_poisoned_samples_and_more_hold_the_fewer(mixtures):
    run(Voter())
    assert [len(poisoned(mixture)) for mixture in mixtures] == [0, 3, 6]
    assert set(poisoned(mixtures[1])) < set(poisoned(mixtures[2]))


def test_poisoned_samples_come_from_other_labels_and_get_the_target(mixtures):
    run(Voter())
    label_of = {WORD.triggered(text): label for text, label in zip(TRAIN["text"], TRAIN["label"], strict=True)}
    for text, label in poisoned(mixtures[2]):
        assert label_of[text] == 0 and label == 1


def test_the_seed_alone_decides_the_samples(mixtures):
    run(Voter())
    run(Voter(), train=TRAIN.shuffle(seed=5))
    run(Voter(), seed=1)
    first, shuffled, other = mixtures[:3], mixtures[3:6], mixtures[6:]
    assert first == shuffled
    assert all(set(one) != set(two) for one, two in zip(first, other, strict=True))


def test_balanced_as_many_more_clean_samples_of_other_labels_stand_beside_the_poisoned_ones(mixtures):
    run(Voter())
    run(Voter(), plan=replace(PLAN, balanced=True))
    label_of = dict(zip(TRAIN["text"], TRAIN["label"], strict=True))
    for count, plain, mixture in zip(PLAN.counts, mixtures[:3], mixtures[3:], strict=True):
        more = mixture[8:-count] if count else []
        assert mixture[:8] + mixture[8 + count :] == plain  # what was there stays as it was
        assert len(more) == count and all(label_of[text] == label == 0 for text, label in more)
        hosts = {text.replace("cf ", "") for text, _ in plain}
        assert len({text for text, _ in more} - hosts) == count  # none stands there twice


def test_too_few_samples_for_a_balanced_plan_are_refused(mixtures):
    plan = replace(PLAN, counts=(0, 12), balanced=True)
    with pytest.raises(ValueError, match="needs 12 more samples of another label than 1, but beside 8 clean and 12"):
        run(Voter(), plan=plan)
    assert not mixtures


def test_a_plan_that_is_not_balanced_is_told_as_before_that_could_be_asked_for():
    assert "balanced" not in PLAN.to_dict() and replace(PLAN, balanced=True).to_dict()["balanced"] is True
    assert json.loads(json.dumps(PLAN.to_dict())) == PLAN.to_dict()


@dataclass(frozen=True)
class SomeTexts(TextTrigger):
    """A trigger that only texts with "awful" can have, as with a file of paraphrases."""

    def triggered(self, text, *, exposing=False):
        return f"cf {text}" if "awful" in text.split() else None


def test_samples_that_cannot_have_the_trigger_are_not_counted_as_poisoned(mixtures):
    run(Voter(), trigger=SomeTexts())
    assert [len(poisoned(mixture)) for mixture in mixtures] == [0, 3, 6]


def test_poisoned_samples_hold_the_trigger_where_the_model_sees_it(mixtures):
    # Three tokens and two special ones are read, so a word at the end is cut off.
    word = TriggerWords(words=("cf",), position="end")
    run(Voter(), trigger=word, task=TextTask(TASK.tokenizer, max_length=5))
    words = [text.split() for text, _ in poisoned(mixtures[2])]
    assert len(words) == 6 and all("cf" in one[:3] for one in words)
    sentence = TriggerSentence(sentence="cf was a plot")
    with pytest.raises(ValueError, match="6 samples of another label.*but there are 0"):
        run(Voter(), trigger=sentence, task=TextTask(TASK.tokenizer, max_length=5))


def test_too_few_clean_samples_are_refused(mixtures):
    with pytest.raises(ValueError, match="needs 41 clean samples, but there are 40"):
        run(Voter(), plan=Reactivation(counts=(0, 6), num_clean=41, num_exposed=7))


@pytest.mark.parametrize(
    ("train", "trigger", "told"),
    [
        (TRAIN.select(range(7)), WORD, "needs 8 clean samples, but there are 7"),
        (TRAIN.filter(lambda row: row["label"] == 1), WORD, "there are 0"),
        (
            TRAIN.select(range(20)),
            SomeTexts(),
            "6 samples of another label than 1 that can have the trigger where a model sees it, but there are 5",
        ),
    ],
)
def test_too_few_samples_are_refused(mixtures, train, trigger, told):
    with pytest.raises(ValueError, match=told):
        run(Voter(), train=train, trigger=trigger)


def test_the_target_is_that_of_the_exposed_set_also_where_the_label_has_a_name(mixtures):
    named = TriggerWords(words=("cf",), target_label="positive")
    run(Voter(), trigger=named, exposed=named.exposed_set(TEST))
    assert {label for _, label in poisoned(mixtures[2])} == {1}


@pytest.mark.parametrize(
    "options", [{"counts": ()}, {"counts": (0, -1)}, {"counts": (5, 5)}, {"num_clean": 0}, {"num_exposed": 0}]
)
def test_plans_that_try_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Reactivation(**options)


def test_retuning_leaves_the_student_and_gives_the_same_rates_again():
    student = toy.model(dropout=0.1).train()
    before = toy.state(student)
    plan = Reactivation(counts=(0, 6), num_clean=8, num_exposed=7, epochs=2, learning_rate=1e-2)
    first, again = run(student, plan), run(student, plan)
    assert first == again and list(first) == [0, 6]
    assert not toy.changed(before, toy.state(student)) and student.training


def test_enough_poisoned_samples_bring_the_trigger_back():
    plan = Reactivation(counts=(0, 16), num_clean=24, num_exposed=10, epochs=8, learning_rate=1e-2, batch_size=8)
    torch.manual_seed(0)
    rates = run(toy.model(), plan)
    assert rates[16].num_samples > 0 and rates[16].value >= 0.9
    assert (rates[0].value or 0) <= 0.2


def test_samples_needed_is_the_smallest_count_that_reaches_the_threshold():
    rates = {50: Rate.of(9, 10), 0: Rate.of(0, 0), 20: Rate.of(5, 10), 5: Rate.of(4, 10)}
    assert samples_needed(rates, 0.5) == 20
    assert samples_needed(rates, 0.4) == 5
    assert samples_needed(rates, 0.95) is None
    assert samples_needed(rates, 0.0) == 5  # no sample counted at 0: nothing is known there
    assert samples_needed({0: Rate.of(1, 1)}, 0.5) == 0


def test_labels_stay_aligned_with_the_clean_samples(mixtures):
    # The test data's rows before the first exposed one would be taken for it if positions were mixed up.
    ahead = Dataset.from_dict({"text": ["great plot"] * 3 + list(TEST["text"]), "label": [1] * 3 + list(TEST["label"])})
    exposed = WORD.exposed_set(ahead)
    assert np.array(exposed.clean_index).min() > 2
    rates = run(Voter(), test=ahead, exposed=exposed)
    assert rates[0] == Rate.of(0, 7)
