"""All that may be said of a report: page, card, pictures and terminal print this, and word nothing themselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from remos_hf.evaluation.measures import Difference
from remos_hf.evaluation.over_seeds import MIN_SEEDS
from remos_hf.judging.given_students import HOW_GIVEN_ARE_READ, LITTLE, shown_by, subjects_of, verdict_of_given
from remos_hf.judging.kinds import BEST, FASTER, MIXED, PUBLISHED, RANDOM, UNKNOWN, Kind
from remos_hf.judging.rows import Row, Section, is_given
from remos_hf.judging.tables import Table
from remos_hf.judging.verdicts import CANNOT, NOT_SHOWN, NOTHING, SHOWN, Claim, Start, Verdict, verdict_of
from remos_hf.judging.words import (
    HOW_INTERVALS_ARE_MADE,
    capitalised,
    cost_told,
    count_told,
    defect_name,
    listed,
    name_told,
    percent,
    student_name,
)

if TYPE_CHECKING:
    from remos_hf.judging.report import DefectReport

_MOST_NAMED = 3  # students in one sentence
BUDGETS = (0.01, 0.02, 0.04)
LIMITS = (
    "This speaks of the defects, inputs and teachers that were measured here, and of no others: it does not say that a "
    "student is free of defects."
)
_OF_RECIPES = (
    "It speaks of students made the same way from {}, and not of the weights of any one student: `remos audit "
    "--student` measures those."
)
_POISONED, _AS_IT_IS = "teachers that we poisoned", "the teacher as it is, for what was found on it"
_ADVICE = {
    "seeds": f"Run the same audit with more seeds: `--seeds 0 1 2` or more (at least {MIN_SEEDS}).",
    "implant": "Give the attacker more (`--attacker-data`, `--teacher-epochs` or `--max-samples`), until the poisoned "
    "teacher obeys its trigger.",
    "implant accuracy": "Train the teachers longer (`--teacher-epochs`): an implant that costs accuracy is seen "
    "without an audit.",
    "teacher samples": "Give more test samples (`--test-data`, `--max-samples`).",
    "commonest": "Train the students longer or on more data (`--epochs`, `--max-samples`): a student that learned "
    "nothing inherits nothing.",
    "samples": "Give more test samples (`--test-data`, `--max-samples`).",
    "floor": "Measure students of a never-poisoned teacher too (`floor_students=`, `--floor-student`).",
    "plain": "Measure plain fine-tuning too: it is what everything is compared with.",
    "wide": "Run the same audit with more seeds or more test samples: the interval is too wide.",
}
_MORE_SAMPLES = "Give more test samples (`--data`, `--max-samples`)"
# Weights that are there have no seeds, and nothing is trained.
_ADVICE_OF_GIVEN = {
    "wide": f"{_MORE_SAMPLES}: the interval is too wide.",
    "samples": f"{_MORE_SAMPLES}.",
    "commonest": "Train the student longer or on more data, and measure it again: a student that learned nothing "
    "inherits nothing.",
}


@dataclass(frozen=True)
class Judgement:
    """What a report comes to.

    Attributes:
        answer: In one sentence, or two short ones.
        advice: What to do.
        limits: What the answer does not say.
        can_be_said: Whether anything can be said of at least one task and defect.
        verdicts: One for each task and defect, in the order of the report.
        glance: The one table that holds the answer: a line for each task and defect.
        how_to_read: How rates and intervals are made.
    """

    answer: str
    advice: list[str]
    limits: list[str]
    can_be_said: bool
    verdicts: list[Verdict]
    glance: Table
    how_to_read: str


def judged(report: "DefectReport", *, budgets: Sequence[float] = BUDGETS) -> Judgement:
    """Judge a report.

    Args:
        report: What was measured.
        budgets: Accuracy that may be lost on clean dev samples, as shares; the answer is given for the middle one.

    Raises:
        ValueError: There is no budget.
        NonFiniteError: A number of the report is NaN or infinite.
    """
    if not budgets:
        raise ValueError("budgets are shares of accuracy that may be lost, such as (0.02,), but got none.")
    report.check_finite()
    budget = sorted(budgets)[len(budgets) // 2]
    sections = report.sections(budgets=budgets)
    verdicts = [verdict_of_given(one) if _alone(one) else verdict_of(one, budget) for one in sections]
    given = [one for one in verdicts if _alone(one.section)]
    made = [one for one in verdicts if not _alone(one.section)]
    unfinished = [f"{name_told(task) or 'The report'}: {told}." for task, told in report.unfinished().items()]
    recipes = [one for one in sections if not all(map(is_given, one.rows))]
    kinds = {one.implanted: _POISONED if one.implanted else _AS_IT_IS for one in recipes}
    whose = " or ".join(kinds[key] for key in sorted(kinds, reverse=True))
    answers = [_answer(made)] if made or not given else []
    answers += [_answer_of_given(given)] if given else []
    return Judgement(
        " ".join(answers),
        _advice(verdicts, budget),
        [*unfinished, LIMITS, *([_OF_RECIPES.format(whose)] if recipes else [])],
        any(one.kind != CANNOT or _some_said(one) for one in verdicts),
        verdicts,
        glance_of(verdicts, budget) if made or not given else glance_of_given(verdicts),
        " ".join([HOW_INTERVALS_ARE_MADE] * bool(made or not given) + [HOW_GIVEN_ARE_READ] * bool(given)),
    )


def _alone(section: Section) -> bool:
    """Whether the students were given, and too few seeds of them to speak of how they were made."""
    return section.given and (section.plain is None or section.plain["dir"].seeds < MIN_SEEDS)


def _some_said(verdict: Verdict) -> bool:
    """Whether something is said of one of several given students, though not of all."""
    return any(claim.about == "shows" and claim.holds is not None for claim in verdict.claims)


def _answer(verdicts: Sequence[Verdict]) -> str:
    kept = [one for one in verdicts if one.kind not in (CANNOT, NOTHING)]
    unknown = [one for one in verdicts if one.kind == CANNOT]
    if len(unknown) == len(verdicts):
        return f"Nothing can be said{_common_reason(unknown)}."
    rest = f"; of {len(unknown)} it cannot be said" if unknown else ""
    first = f"Plain fine-tuning keeps {len(kept) or 'none'} of {_counted(verdicts)}{rest}."
    if not kept:
        return first if unknown else f"{first} There is nothing to remove."
    told = [kind for kind in (*BEST, PUBLISHED) if any(one.start(kind) for one in kept)]
    return " ".join([first, *(_removed(kept, kind) for kind in told or [PUBLISHED])])


def _counted(verdicts: Sequence[Verdict]) -> str:
    """Count defects; of several tasks each defect counts once a task."""
    several = len({one.section.task for one in verdicts}) > 1
    return f"{count_told(len(verdicts), 'pair')} of task and defect" if several else count_told(len(verdicts), "defect")


def _removed(kept: Sequence[Verdict], kind: Kind) -> str:
    """Say of how many of the defects that are kept one start removes or reduces, and at what accuracy."""
    starts = [start for one in kept if (start := one.start(kind)) is not None]
    name = capitalised(kind.name)
    if not starts:
        unknown = any(row["kind"] in (UNKNOWN, MIXED) for one in kept for row in one.section.rows)
        return f"Whether {kind.name} was measured is not known." if unknown else f"{name} was not measured."
    removed, reduced = sum(bool(one.removes) for one in starts), sum(bool(one.reduces) for one in starts)
    lost = [one.row["against_plain"]["acc"].value for one in starts]
    costs = [one for one in lost if one is not None]
    cost = f" at {cost_told(Difference(fmean(costs), None, None))}" if costs else ""
    did = f"removes {removed or 'none'} of them"
    if reduced > removed:
        others = f" and reduces {count_told(reduced - removed, 'other')}"
        did = did + others if removed else f"reduces {reduced} of them and removes none,"
    outside = sum(one.within is False for one in starts)
    over = f" ({'' if outside == len(starts) else f'for {outside} of {len(starts)} '}more than the budget)"
    unknown = len(kept) - len(starts) + sum(one.reduces is None for one in starts)
    rest = f"; of {unknown} of them it cannot be said" if unknown else ""
    return f"{name} {did}{cost}{over if outside else ''}{rest}."


def _answer_of_given(verdicts: Sequence[Verdict]) -> str:
    names = list(dict.fromkeys(name for one in verdicts for name in subjects_of(one.section)))
    if not any(map(_some_said, verdicts)):
        return f"Nothing can be said of these weights{_common_reason(verdicts)}."
    said = [_shows(verdicts, name, alone=len(names) == 1) for name in names[:_MOST_NAMED]]
    said += [f"{len(names) - _MOST_NAMED} more are in the table"] if len(names) > _MOST_NAMED else []
    quiet = sum(one.kind == NOT_SHOWN and any(map(_had_little, one.claims)) for one in verdicts)
    rest = f" Of {quiet} the teacher itself shows little or nothing: there was little to inherit." if quiet else ""
    return f"Of {_counted(verdicts)} tried, {'; '.join(said)}.{rest}"


def _had_little(claim: Claim) -> bool:
    return claim.about == "obeys" and claim.figure.value < LITTLE


def _shows(verdicts: Sequence[Verdict], name: str, *, alone: bool) -> str:
    """Say how many defects one given student shows."""
    said = Counter(shown_by(one.claims, name) for one in verdicts if name in subjects_of(one.section))
    who, shows, not_shows = (
        ("these weights", "show", "do not show") if alone else (_quoted(name), "shows", "does not show")
    )
    parts = [f"{words} {said[kind]}" for words, kind in ((shows, SHOWN), (not_shows, NOT_SHOWN)) if said[kind]]
    if set(said) == {NOT_SHOWN}:
        return f"{who} {shows} none"
    unknown = f"of {said[CANNOT]} it cannot be said" if said[CANNOT] else ""
    if not parts:
        return f"{who}: {unknown}"
    return f"{who} {'; '.join(filter(None, [' and '.join(parts), unknown]))}"


def _quoted(name: str) -> str:
    return f"“{name_told(name)}”"


def _common_reason(verdicts: Sequence[Verdict]) -> str:
    held = [one.reasons[0].text for one in verdicts if one.reasons]
    if not held:
        return ""
    (text, count), *others = Counter(held).most_common()
    return f": {text}" + (f" ({count} of {len(held)}; the others for other reasons)" if others else "")


def _advice(verdicts: Sequence[Verdict], budget: float) -> list[str]:
    keys = [(reason.key, _alone(one.section)) for one in verdicts for reason in one.reasons]
    advice = {False: _ADVICE, True: {**_ADVICE, **_ADVICE_OF_GIVEN}}
    said = [*dict.fromkeys(advice[given][key] for key, given in keys if key in _ADVICE)]
    kept = [one for one in verdicts if one.kind not in (CANNOT, NOTHING, SHOWN, NOT_SHOWN)]
    if not kept:
        return said
    within = f"within {100 * budget:g} points of dev accuracy"
    best: dict[str, list[Verdict]] = {}
    for one in kept:
        if one.best is not None:
            best.setdefault(one.best.kind.name, []).append(one)
    told = [f"{name} leaves least of {listed([_title(one, kept) for one in of])}" for name, of in best.items()]
    first = [f"{capitalised('; '.join(told))}, {within}."] if told else []
    if none := [one for one in kept if one.best is None]:
        of = f"of {listed([_title(one, kept) for one in none])}"
        first.append(f"No start that was measured is shown to reduce what is kept {of} {within}.{_what_then(none)}")
    level = [one for one in kept if one.best is not None and _no_better_than_rivals(one)]
    if level:
        first.append(
            f"For {len(level)} of {len(kept)} no choice of weights is shown to do better than a random reset and a "
            "higher learning rate at equal accuracy."
        )
    return [" ".join(first), *said]


def _what_then(verdicts: Sequence[Verdict]) -> str:
    """Say what to do where no start is shown to help: something else, or more measurements."""
    starts = [start for one in verdicts for start in one.starts]
    if not starts:
        return " Measure other starts."
    if any(one.reduces is None or one.within is None for one in starts):
        return " Of some it cannot be said: more seeds, samples or dev accuracy may tell."
    return " Take another teacher, or pay more."


def _no_better_than_rivals(verdict: Verdict) -> bool:
    """Whether the best start is a rival itself, or is told apart from none of those that it was compared with."""
    if verdict.best.kind in (RANDOM, FASTER):
        return True
    return any(claim.holds is False for claim in verdict.claims if claim.about == "beats")


def glance_of(verdicts: Sequence[Verdict], budget: float) -> Table:
    """Give a line for each task and defect: the verdict, and the figures that it stands on."""
    rivals = [kind for kind in (RANDOM, FASTER) if any(one.start(kind) for one in verdicts)]
    best = [kind for kind in BEST if any(one.start(kind) for one in verdicts)]
    shown = [*best, PUBLISHED, *rivals]  # the published rule always has its place, measured or not
    others = any(one.best and one.best.kind not in shown for one in verdicts)
    lines = []
    for one in verdicts:
        plain, teacher = one.section.plain, one.section.teacher
        lines.append(
            [
                _title(one, verdicts),
                one.verdict,
                _point(teacher),
                _point(plain),
                percent(plain["floor"]) if plain else "-",
                *(_reached(one.start(kind)) for kind in shown),
                *([_best_of(one, shown)] if others else []),
            ]
        )
    header = ("defect", "what can be said", "teacher", "plain fine-tuning", "benign floor")
    header += tuple(kind.name for kind in shown) + (("best other start",) if others else ())
    return Table(f"DIR % at ACC %; starts may lose {100 * budget:g} points of dev accuracy", header, lines)


def glance_of_given(verdicts: Sequence[Verdict]) -> Table:
    """Give a line for each defect and each given student: the verdict and its figures."""
    lines = [
        [
            _name(one),
            name_told(row["student"]),
            _said_of(one, row["student"]),
            percent(one.section.teacher["dir"]) if one.section.teacher else "-",
            percent(row["dir"]),
            percent(row["floor"]),
            percent(row["acc"]),
            str(row["dir"].samples_of_a_seed),
        ]
        for one in verdicts
        for row in one.section.rows
    ]
    header = ("defect", "weights", "what can be said", "teacher DIR %", "DIR %", "benign floor %", "ACC %", "n")
    return Table("These weights, on these inputs", header, lines)


def _said_of(verdict: Verdict, student: str) -> str:
    """Give a given student's own verdict, with the reason where it cannot be said."""
    said = shown_by(verdict.claims, student)
    reasons = [one.reason.text for one in verdict.claims if one.student == student and one.reason is not None]
    return f"{said}: {reasons[0]}" if said == CANNOT and reasons else said


def _title(verdict: Verdict, among: Sequence[Verdict]) -> str:
    """Name a defect, with its task where there are several."""
    task, several = verdict.section.task, len({one.section.task for one in among}) > 1
    return f"{name_told(task)}: {_name(verdict)}" if several and task else _name(verdict)


def _name(verdict: Verdict) -> str:
    return defect_name(verdict.section.defect, verdict.section.described)


def _point(row: Row | None) -> str:
    return f"{percent(row['dir'])} at {percent(row['acc'])}" if row else "-"


def _reached(start: Start | None) -> str:
    if start is None:
        return "-"
    cost = {True: "", False: " (over the budget)", None: " (budget not checked)"}[start.within]
    return f"{_point(start.row)}{cost}"


def _best_of(verdict: Verdict, shown: Sequence[Kind]) -> str:
    best = verdict.best
    return f"{student_name(best.row)}: {_reached(best)}" if best and best.kind not in shown else "-"
