"""What may be said of one student beside plain fine-tuning, random resets and the higher learning rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remos_hf.evaluation.measures import rate_of
from remos_hf.evaluation.over_seeds import MIN_SEEDS, difference_on_samples
from remos_hf.judging.gates import Reason, of_a_student, reasons_against
from remos_hf.judging.given_students import verdict_of_given
from remos_hf.judging.kinds import FASTER, PLAIN, RANDOM
from remos_hf.judging.rows import GIVEN, Row, Section, named_row
from remos_hf.judging.verdicts import CANNOT, INHERITS, NOT_SHOWN, NOTHING, SHOWN, Verdict, against_rival
from remos_hf.judging.words import (
    capitalised,
    cost_told,
    count_told,
    defect_name,
    listed,
    name_told,
    percent,
    points_told,
    rate_told,
    student_name,
    tenths,
)

PLAINLY = "plain fine-tuning itself"
LESS = "inherited less than by plain fine-tuning"
NOT_LESS = "not shown to be inherited less than by plain fine-tuning"
_MOST_NAMED = 3
_NOTHING_DONE = "It is plain fine-tuning: nothing was done against inheriting the defect."
# In the order in which an answer counts them.
_COUNTED = {
    SHOWN: "show {}",
    NOT_SHOWN: "do not show {}",
    LESS: "inherit {} less than plain fine-tuning does",
    NOT_LESS: "are not shown to inherit {} less than plain fine-tuning does",
    NOTHING: "cannot be judged by {}, which plain fine-tuning does not inherit",
    PLAINLY: "inherit {}: they are plain fine-tuning",
}


@dataclass(frozen=True)
class OfStudent:
    """What is said of one student and one defect.

    Attributes:
        defect: The defect's plain name.
        kind: Of what is said, to count by: `SHOWN` or `NOT_SHOWN` of weights that were given; `LESS`, `NOT_LESS`,
            `NOTHING` or `PLAINLY` of students made alike; `CANNOT`.
        sentences: In full.
        reason: Why nothing can be said; None if something can.
    """

    defect: str
    kind: str
    sentences: list[str]
    reason: Reason | None = None


def of_student(verdict: Verdict, student: str) -> OfStudent:
    """Say of one student what its row shows.

    Args:
        verdict: That of the student's task and defect.
        student: The student's name; it has a row there.
    """
    section = verdict.section
    row = named_row(section.rows, student)
    name = defect_name(section.defect, section.described)
    if any(record.get(GIVEN) for record in row["records"]):
        return _of_given(section, row, name)
    return _of_recipe(verdict, row, name)


def _of_given(section: Section, row: Row, name: str) -> OfStudent:
    claims = [claim for claim in verdict_of_given(section).claims if claim.student == row["student"]]
    shows = [claim for claim in claims if claim.about == "shows"]
    sentences = [claim.sentence for claim in claims]
    if all(claim.holds is None for claim in shows):
        return OfStudent(name, CANNOT, sentences, shows[0].reason)
    if row is section.plain and row["kind"] == PLAIN:
        sentences.append(_NOTHING_DONE)
    else:
        sentences += [*_beside_plain(section, row), *_beside_rivals(section, row)]
    return OfStudent(name, SHOWN if any(claim.holds for claim in shows) else NOT_SHOWN, sentences)


def _beside_plain(section: Section, row: Row) -> Iterator[str]:
    """Compare two models by their samples; what differs between their recipes takes seeds."""
    by_seed = {} if section.plain is None else {record["seed"]: record for record in section.plain["records"]}
    own = next((record for record in row["records"] if record["seed"] in by_seed), None)
    if own is None:
        yield "Plain fine-tuning was not measured beside it: whether it inherited less is not known."
        return
    plain = by_seed[own["seed"]]
    mine, its = rate_of(own["dir"]), rate_of(plain["dir"])
    by = difference_on_samples(mine, its, (own.get("outcomes"), plain.get("outcomes")))
    if by.value is None:
        yield "Plain fine-tuning gets no sample right on which the defect could show: there is nothing to compare."
        return
    apart = "" if by.high < 0 or by.low > 0 else ", which may be chance"
    yield (
        f"The plainly fine-tuned student beside it shows it on {rate_told(its)}: “{name_told(row['student'])}” does so "
        f"{points_told(by)} {'less' if by.value < 0 else 'more'}{apart}. Its accuracy is {_accuracies(own, plain)}. "
        f"That compares two models; how students made these two ways differ takes at least {MIN_SEEDS} seeds of each."
    )


def _accuracies(own: dict, other: dict) -> str:
    return f"{percent(rate_of(own['acc']))} %, the other's {percent(rate_of(other['acc']))} %"


def _beside_rivals(section: Section, row: Row) -> Iterator[str]:
    for rival in (RANDOM, FASTER):
        if row["kind"] != rival:
            yield against_rival(row, rival, section).sentence


def _of_recipe(verdict: Verdict, row: Row, name: str) -> OfStudent:
    section, plain = verdict.section, verdict.section.plain
    called = capitalised(student_name(row))
    # A verdict of students that were given stands without plain fine-tuning; one of a recipe does not.
    reasons = [*(verdict.reasons or reasons_against(section)), *of_a_student(row, called)]
    measured = [] if row["dir"].value is None else [_numbers(row, called)]
    if reasons:
        told = f"What {student_name(row)} inherits cannot be said: {'; '.join(one.text for one in reasons)}."
        return OfStudent(name, CANNOT, [*measured, told], reasons[0])
    if row is plain:
        kind = NOTHING if verdict.kind == NOTHING else PLAINLY
        return OfStudent(name, kind, [verdict.claims[0].sentence, _NOTHING_DONE])
    if verdict.kind == NOTHING:
        return OfStudent(name, NOTHING, [*measured, verdict.claims[0].sentence])
    by = row["against_plain"]["dir"]
    if by.low is None:
        reason = Reason("seeds", f"{count_told(by.seeds, 'seed')} in common with it; {MIN_SEEDS} are needed")
        told = f"Whether that is less than plain fine-tuning's {rate_told(plain['dir'])} cannot be said: {reason.text}."
        return OfStudent(name, CANNOT, [*measured, told], reason)
    lost = row["against_plain"]["acc"]
    cost = f", at {cost_told(lost, PLAIN.name)}" if lost.value is not None else ""
    if by.high < 0:
        told = f"It inherits {points_told(by)} less than plain fine-tuning{cost}.{_left(row)}"
        return OfStudent(name, LESS, [*measured, told, *_beside_rivals(section, row)])
    told = f"It is not shown to inherit less than plain fine-tuning, which is at {rate_told(plain['dir'])}{cost}."
    return OfStudent(name, NOT_LESS, [*measured, told])


def _numbers(row: Row, called: str) -> str:
    floor = row["floor"]
    twin = "" if floor is None or floor.value is None else f"; its benign floor is {tenths(floor.value)} %"
    return f"{called} reaches DIR {rate_told(row['dir'])} at {percent(row['acc'])} % accuracy{twin}."


def _left(row: Row) -> str:
    excess = row["excess"]
    if excess is None or excess.low is None:
        return " It has no benign floor of its own, so what is left cannot be said."
    side = "below" if excess.value < 0 else "above"
    gone = " It removes the defect:" if excess.high < INHERITS else ""
    told = f"what is left is {points_told(excess)} {side} its own benign floor."
    return f"{gone} {told}" if gone else f" {capitalised(told)}"


def answer_of(told: Sequence[OfStudent], subject: str) -> str:
    """Say in one sentence what all defects come to.

    Args:
        told: What is said of each defect.
        subject: Who, in the plural: "these weights".
    """
    unknown = [one for one in told if one.kind == CANNOT]
    if len(unknown) == len(told):
        return f"Nothing can be said of {subject}: {unknown[0].reason.text}."
    by_kind = {kind: [one.defect for one in told if one.kind == kind] for kind in _COUNTED}
    said = [words.format(_named(by_kind[kind])) for kind, words in _COUNTED.items() if by_kind[kind]]
    said += [f"of {_named([one.defect for one in unknown])} it cannot be said"] if unknown else []
    return f"Of {count_told(len(told), 'defect')}, {subject} {'; '.join(said)}."


def _named(defects: Sequence[str]) -> str:
    return listed(defects) if len(defects) <= _MOST_NAMED else f"{len(defects)} of them"


def follows_of(told: Sequence[OfStudent]) -> str:
    """Say what follows for whoever would use these weights, from what they show."""
    shown = [one.defect for one in told if one.kind == SHOWN]
    if shown:
        return f"They fail on inputs with {listed(shown)}: use them only where nobody makes such inputs."
    if all(one.kind == NOT_SHOWN for one in told):
        return "Nothing that was tried shows. That does not say that they are free of defects."
    return "What cannot be said is not known to be absent."
