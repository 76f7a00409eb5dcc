"""All that may be said of a report: page, card, pictures and terminal print this, and word nothing themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

from remos_hf.judging.report import DefectReport
from remos_hf.judging.tables import Table
from remos_hf.judging.verdicts import UNKNOWN, Verdict, answer_of, glance_table, verdict_of

BUDGETS = (0.01, 0.02, 0.04)


@dataclass(frozen=True)
class Judgement:
    """What a report comes to.

    Attributes:
        answer: In one sentence.
        advice: What to do, in a few sentences.
        limits: What the answer does not say.
        can_be_said: Whether anything can be said of at least one task and defect.
        verdicts: One for each task and defect, in the order of the report.
        glance: The one table that holds the answer: a line for each task and defect.
        how_to_read: What the tables' words and intervals mean.
    """

    answer: str
    advice: list[str]
    limits: list[str]
    can_be_said: bool
    verdicts: list[Verdict]
    glance: Table
    how_to_read: list[str]


def judged(report: DefectReport, *, budgets: Sequence[float] = BUDGETS) -> Judgement:
    """Judge a report.

    Args:
        report: What was measured.
        budgets: Accuracy that may be lost on clean dev samples, as shares; the answer is given for the middle one.
    """
    budget = sorted(budgets)[len(budgets) // 2]
    told = [verdict_of(section, budget) for section in report.sections(budgets=budgets)]
    first, *others = answer_of(told, budget)
    return Judgement(
        first,
        others[:-1],
        others[-1:],
        any(one.kind != UNKNOWN for one in told),
        told,
        glance_table(told, budget),
        ["HOW_TO_READ"],
    )
