import pytest
from datasets import ClassLabel

from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.text_triggers import TriggerWords
from remos_hf.strategies import Finetune
from tests.auditing.audits import WORD, small_audit, text_data
from tests.defects import toy

NAMED = TriggerWords(words=("cf",), target_label="good")


def test_the_data_are_named_by_their_contents(log):
    before = small_audit(log).to_dict()["data"]
    other = small_audit(log, dev=text_data([*toy.texts(11), ("a great plot", 0)])).to_dict()["data"]
    assert {part for part in before if before[part] != other[part]} == {"dev"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "count twice"),
        ({"students": {}}, "at least one"),
        ({"defects": {}}, "at least one"),
        ({"defects": {"clean": WORD}}, "never-poisoned"),
        ({"defects": {"a/b": WORD}}, "file names, but got 'a/b'"),
        ({"students": {"a\\b": StudentPlan(Finetune())}}, "file names"),
        ({"students": {"finetune": StudentPlan(Finetune(), defects=("sentence",))}}, "planned for .'sentence'."),
    ],
)
def test_audits_that_decide_nothing_are_refused(log, options, told):
    with pytest.raises(ValueError, match=told):
        small_audit(log, **options)


def test_what_no_input_shows_is_refused_before_anything_is_trained(log):
    with pytest.raises(TypeError, match="LabelNoise makes none"):
        small_audit(log, defects={"word": WORD, "noise": LabelNoise()})


def test_all_samples_get_the_students_classes_so_a_target_by_name_is_one_number(log):
    def named(data, *names):
        return data.cast_column("label", ClassLabel(names=list(names)))

    student, other = named(toy.data(24), "bad", "good"), named(toy.data(16), "good", "bad")
    audit = small_audit(log, student=student, attacker=other, dev=other, test=other, defects={"word": NAMED})
    assert audit.attacker.features["label"].names == audit.test.features["label"].names == ["bad", "good"]
    assert audit.test["label"][:] == [1 - label for label in other["label"]]
    assert NAMED.exposed_set(other).target_label == 0 and NAMED.exposed_set(audit.test).target_label == 1
    with pytest.raises(ValueError, match="dev has the class 'worse', which student has not"):
        small_audit(log, student=student, attacker=student, dev=named(toy.data(12), "worse", "good"), test=student)
