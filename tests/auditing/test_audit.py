import pytest

from remos_hf.auditing.students import StudentPlan
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.strategies import Finetune
from tests.auditing.audits import WORD, small_audit, text_data
from tests.defects import toy


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
