import pytest

from remos_hf.judging import verdicts
from remos_hf.judging.report import DefectReport
from tests.showing.test_page import PLAIN, faster, random, record, remos


def told(*records, budget=0.02):
    (section,) = DefectReport(list(records)).sections(budgets=(budget,))
    return verdicts.verdict_of(section, budget)


@pytest.mark.parametrize(
    ("records", "kind"),
    [
        ([remos(10), random(60), faster(40)], verdicts.UNKNOWN),
        ([record("finetune", 0, of=0)], verdicts.UNKNOWN),
        ([record("finetune", 95, floor=None), remos(10), random(60), faster(40)], verdicts.UNKNOWN),
        ([record("finetune", 5), remos(0), random(5), faster(5)], verdicts.NOTHING),
        ([PLAIN, remos(10), random(60), faster(40)], verdicts.BELOW_BOTH),
        ([PLAIN, remos(10), random(60), faster(12)], verdicts.NOT_APART),
        ([PLAIN, remos(10), random(11), faster(60)], verdicts.NOT_APART),
        ([PLAIN, remos(60), random(70), faster(10)], verdicts.BEATEN),
        ([PLAIN, remos(60), random(10), faster(90)], verdicts.BEATEN),
        ([PLAIN, remos(94), random(10), faster(20)], verdicts.AS_PLAIN),
        ([PLAIN, remos(10, dev=80), random(60), faster(40)], verdicts.NO_RULE),
        ([PLAIN, random(60), faster(40)], verdicts.NO_RULE),
        ([PLAIN, remos(10), faster(40)], verdicts.ALONE),
        ([PLAIN, remos(10), random(60)], verdicts.ALONE),
        ([PLAIN, remos(10), random(60), faster(5, dev=50)], verdicts.BELOW_BOTH),
        ([PLAIN, record("retrain", 0, strategy={"name": "Retrain"})], verdicts.NO_RULE),
    ],
)
def test_the_verdict_follows_from_the_numbers(records, kind):
    assert told(*records).kind == kind


def test_the_best_rule_is_the_one_of_lowest_dir_within_the_budget():
    costly, weak = remos(1, ratio=0.5, rule="costly", dev=80), remos(50, ratio=0.8, rule="weak")
    found = told(PLAIN, remos(10), costly, weak, random(60), faster(40))
    assert found.best.rule == "remos, model scope"
    text = " ".join(found.sentences)
    assert "The best of 2 rules within 2 points" in text and "picked by its DIR" in text
    assert "DIR 10.0 % [5.5, 17.4] (n = 100)" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert told(PLAIN, remos(10), costly, weak, budget=0.2).best.rule == "costly"


def test_what_cannot_be_concluded_is_said():
    assert "no benign floor" in " ".join(told(record("finetune", 95, floor=None)).sentences)
    assert "was not measured" in " ".join(told(remos(10)).sentences)
    text = " ".join(told(PLAIN, remos(10), random(12)).sentences)
    assert "not told apart" in text and "The higher learning rate was not measured." in text
    assert "an interval that holds 0" in " ".join(told(PLAIN, remos(2), random(60)).sentences)
    without = {**PLAIN, "dev_acc": None}
    assert "dev accuracy was not measured" in " ".join(told(without, remos(10)).sentences)
