import pytest

from remos_hf.sharing.card_record import described, is_untrained, loading, slicing_facts, training_facts, why
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies import STRATEGIES
from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.base import Preparation
from remos_hf.strategies.composed import as_strategy
from remos_hf.strategies.guided import Guided
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.neft import Neft
from remos_hf.strategies.plain import Finetune, Retrain
from remos_hf.strategies.slice_and_reset import Random, Remos, SliceAndReset
from remos_hf.strategies.subspace import Subspace
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")
TEACHER = {"id": "owner/teacher"}


def record(strategy, **config):
    return Sidecars({"strategy": strategy.to_dict(), "teacher": TEACHER, **config})


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        (Remos(0.9), "made by ReMoS, keeping 90 % of the weights that compete."),
        (Random(0.75), "made by a random reset, keeping 75 % of the weights that compete."),
        (Finetune(), "made by plain fine-tuning."),
        (Retrain(), "made by training from scratch."),
    ],
)
def test_a_student_is_described_by_its_teacher_and_how_it_was_made(strategy, how):
    assert described(record(strategy), "SST-2") == f"A student of owner/teacher for SST-2, {how}"
    assert described(record(strategy), "") == f"A student of owner/teacher, {how}"


def test_a_higher_learning_rate_is_told():
    told = described(record(Finetune()), "", 3.0)
    assert "made by plain fine-tuning, at 3 times the learning rate." in told


def test_several_strategies_are_all_named_and_told_of():
    held = Sidecars({"strategy": {"name": "x", "strategies": [Remos(0.9).to_dict(), L2SP().to_dict()]}})
    assert "made by ReMoS with L2-SP." in described(held, "") and "ReMoS keeps the weights" in why(held)


def test_a_start_and_what_holds_it_are_told_part_by_part():
    told = why(record(as_strategy([Subspace(), Guided()])))
    assert "rebuilt before training on the directions" in told and "a step along the teacher's own features" in told


def test_what_cartl_did_is_told():
    told = why(record(as_strategy([Neft(), AdversarialTraining()])))
    assert "last units alone" in told and "where the model itself found it hardest" in told


def test_every_strategy_of_the_package_has_a_sentence_of_its_own():
    recipes = [
        kind(**({"slice_ratio": 0.9} if issubclass(kind, SliceAndReset) else {})) for kind in STRATEGIES.values()
    ]
    told = [why(record(one)) for one in recipes]
    assert len(set(told)) == len(told) and all(one.endswith(".") for one in told)
    assert not [one for one in told if "what the strategy below says" in one]


def test_only_plain_fine_tuning_is_told_to_have_done_nothing():
    nothing = "Nothing was done against inheriting"
    assert nothing in why(record(Finetune())) and "embedding rows" not in why(record(Finetune()))
    for strategy in (Finetune(embedding_rows="mean"), as_strategy([Finetune(embedding_rows="mean"), L2SP()])):
        assert nothing not in why(record(strategy)) and "embedding rows of tokens" in why(record(strategy))
    assert "near the teacher's" in why(record(as_strategy([Finetune(), L2SP()])))


def test_a_setting_that_trials_chose_is_told_with_its_budgets():
    ratio = {"slice_ratio": 0.7, "accuracy_budget": 0.02}
    effect = {"knob": "energy", "setting": 0.97, "effect_budget": 0.05, "accuracy_budget": 0.01}
    facts = dict(slicing_facts(record(Random(0.7), ratio_search=ratio)))
    assert facts["slice ratio chosen by trials"] == "0.7: accuracy within 2 points of plain fine-tuning's"
    facts = dict(slicing_facts(record(Random(0.7), effect_search=effect)))
    assert facts["energy chosen by trials"] == (
        "0.97: own triggers within 5 points of untaught ones, accuracy within 1 points of plain fine-tuning's"
    )
    # A record is a stranger's: what it should hold may be missing, or anything.
    forged = {**effect, "knob": "<img src=x> | [energy](http://x)"}
    for odd in ({}, {"setting": "x", "accuracy_budget": 0.1}, {"setting": 0.5}, forged, {**effect, "knob": []}):
        assert not any("chosen" in name for name, _ in slicing_facts(record(Random(0.7), effect_search=odd)))


def test_a_sliced_and_never_trained_checkpoint_is_no_student():
    strategy = Random(0.9)
    student = tiny.bert()
    preparation = strategy.prepare(student, tiny.student_data())
    on_disk = Sidecars.of(strategy, preparation, None, teacher=TEACHER)
    assert is_untrained(on_disk) and not is_untrained(Sidecars.of(strategy, preparation, student))
    told = described(on_disk, "")
    assert told.startswith("owner/teacher, sliced by a random reset, keeping 90 %") and "not trained since" in told
    assert "A student of" not in told
    on_disk.config["training"] = {"steps": 3}
    assert not is_untrained(on_disk)
    assert not is_untrained(Sidecars.of(Finetune(), Preparation(), tiny.bert()))


def test_training_that_is_not_over_is_told():
    half = record(Finetune(), training={"steps": 10, "planned_steps": 40})
    assert "Training has taken 10 of 40 steps." in described(half, "")
    assert "Training has" not in described(record(Finetune(), training={"steps": 40, "planned_steps": 40}), "")


def test_no_reason_is_given_as_if_it_were_a_result():
    assert "Whether it holds here is what was measured below, or was not." in why(record(Remos(0.9)))


def test_hyper_parameters_are_told_in_words_and_unknown_ones_left_out():
    held = record(Finetune(), training={"learning_rate": 1e-4, "precision": "bf16", "somebody's": 3})
    assert training_facts(held) == [("learning rate", 1e-4), ("precision", "bf16")]
    assert training_facts(record(Finetune())) == []


def test_a_class_is_loaded_by_its_own_auto_model():
    assert "AutoModelForCausalLM.from_pretrained" in loading({"class": "LlamaForCausalLM"}, "me/student")
