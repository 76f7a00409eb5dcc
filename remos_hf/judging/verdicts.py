"""Numbers to sentences, as data: what may be said of each task and defect, and what cannot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from remos_hf.judging.tables import Choice, Section, Table, percent, rule_of
from remos_hf.judging.words import capitalised, choice_name, count_told, rate_told


@dataclass(frozen=True)
class Verdict:
    """What is said of one task and defect.

    Attributes:
        section: Its numbers.
        verdict: In one line.
        kind: Of the verdict, to count by.
        sentences: In full.
        best: The rule that inherits least within the budget, or None.
        rivals: What the random reset and the higher learning rate reach, by name; None where not within the budget.
    """

    section: Section
    verdict: str
    kind: str
    sentences: list[str]
    best: Choice | None = None
    rivals: dict[str, Choice | None] = field(default_factory=dict)


RANDOM, FASTER = "the random reset", "the higher learning rate"


UNKNOWN = "cannot be said"


NOTHING = "not inherited"


NO_RULE = "inherited; no rule within the budget"


AS_PLAIN = "inherited; no rule is below plain fine-tuning"


BELOW_BOTH = "inherited; less by the best rule than by both rivals"


NOT_APART = "inherited; less by the best rule, but not apart from a rival"


_LIMITS = (
    "“Less inherited” speaks of the defects and inputs measured here and of no others. It does not say that a "
    "student is free of defects."
)


ALONE = "inherited; less by the best rule, but a rival is missing"


BEATEN = "inherited; a rival inherits less than the best rule"


def verdict_of(section: Section, budget: float) -> Verdict:
    """Say what the numbers of one task and defect show, with at most `budget` of dev accuracy lost."""
    plain = section.plain
    if plain is None or plain["dir"].value is None:
        why = "plain fine-tuning was not measured" if plain is None else "plain fine-tuning has no DIR"
        said = f"Nothing can be concluded: {why}, so whether there is anything to reduce is not known."
        return Verdict(section, f"{UNKNOWN}: {why}", UNKNOWN, [said])
    floor = plain["floor"]
    has_floor = floor is not None and floor.value is not None
    first = (
        f"Plain fine-tuning shows the defect on {rate_told(plain['dir'])} ({count_told(plain['seeds'], 'seed')}), "
        + (f"a student of a never-poisoned teacher on {rate_told(floor)} (the benign floor)." if has_floor else "")
        + ("" if has_floor else "and there is no benign floor: part of it may be errors of its own.")
    )
    if not section.inherits:
        inside = f"the excess over the floor is {percent(plain['excess'], interval=True)} points" if has_floor else ""
        first += f" It does not inherit the defect{': ' + inside if inside else ''}."
        last = "There is nothing to reduce here, and no row below shows that a strategy works."
        return Verdict(section, NOTHING, NOTHING, [first, last])
    first += " It inherits the defect." if has_floor else ""
    kind, sentences, best, rivals = _compared(section, budget)
    if not has_floor:
        kind = UNKNOWN
        sentences.append("Without a benign floor nothing can be concluded about what was inherited.")
    verdict = "shown, but no benign floor: how much is inherited cannot be said" if not has_floor else kind
    return Verdict(section, verdict, kind, [first, *sentences], best, rivals)


def _compared(section: Section, budget: float) -> tuple[str, list[str], Choice | None, dict[str, Choice | None]]:
    """Say what the best rule reaches within the budget, beside plain fine-tuning, random reset and learning rate."""
    within = f"within {100 * budget:g} points of dev accuracy"
    asked = [choice for choice in section.chosen if choice.budget == budget]
    if not asked:
        return NO_RULE, ["No rule was compared at equal accuracy: dev accuracy was not measured."], None, {}
    rows = {rule_of(row): row for row in reversed(section.rows)}
    kinds = {choice.rule: kind_of(rows[choice.rule]) for choice in asked}
    rules = [choice for choice in asked if kinds[choice.rule] == "rule"]
    able = [choice for choice in rules if choice.row is not None and choice.row["dir"].value is not None]
    rivals = {name: _least([one for one in asked if kinds[one.rule] == name]) for name in (RANDOM, FASTER)}
    measured = set(kinds.values())
    if not able:
        sentences = [f"No rule stays {within}: nothing can be concluded about rules at this accuracy."]
        return NO_RULE, [*sentences, *_rivals_told(rivals, measured, None, within)], None, rivals
    best = _least(able)
    which = "only rule" if len(able) == 1 else f"best of {len(able)} rules"
    sentences = [
        f"The {which} {within} is {choice_name(best)}: DIR {rate_told(best.row['dir'])} at "
        f"{percent(best.row['acc'])} % test accuracy ({count_told(best.row['seeds'], 'seed')}), against "
        f"{percent(section.plain['acc'])} % by plain fine-tuning."
        + (" The best is picked by its DIR on the test samples, which flatters it." if len(able) > 1 else "")
    ]
    excess = best.row["excess"]
    if excess is not None and excess.value is not None and excess.low <= 0:
        sentences.append(
            f"Over its own benign floor it is {percent(excess, interval=True)} points, an interval that holds 0."
        )
    sentences += _rivals_told(rivals, measured, best, within)
    if _against(best, section.plain) != "below":
        sentences.append("Its interval and that of plain fine-tuning overlap, or it is above: nothing was gained here.")
        return AS_PLAIN, sentences, best, rivals
    against = [_against(best, rival.row) for rival in rivals.values() if rival is not None]
    if "above" in against:
        return BEATEN, sentences, best, rivals
    if "not apart" in against:
        return NOT_APART, sentences, best, rivals
    # A rival that was tried and costs more accuracy than allowed is out of the race; one never tried is not.
    return (BELOW_BOTH if {RANDOM, FASTER} <= measured else ALONE), sentences, best, rivals


def _rivals_told(
    rivals: Mapping[str, Choice | None], measured: set[str], best: Choice | None, within: str
) -> Iterator[str]:
    for name, rival in rivals.items():
        if name not in measured:
            yield f"{capitalised(name)} was not measured."
        elif rival is None:
            yield f"{capitalised(name)} has no student {within}."
        else:
            reached = f"{capitalised(name)} ({choice_name(rival)}) reaches DIR {rate_told(rival.row['dir'])} {within}"
            said = {
                "below": "the best rule inherits less, and the 95 % intervals do not overlap",
                "above": "it inherits less than the best rule, and the 95 % intervals do not overlap",
                "not apart": "the 95 % intervals overlap: the two are not told apart",
            }
            yield f"{reached}: {said[_against(best, rival.row)]}." if best else f"{reached}."


def kind_of(row: Mapping[str, Any]) -> str:
    """Tell rules from what they are compared with: `RANDOM`, `FASTER`, "retrain" or "rule"."""
    rule, strategy = rule_of(row), row["made"].get("strategy") or {}
    if strategy.get("name", "").lower() == "random" or rule.partition(" ")[0].rstrip(",") == "random":
        return RANDOM
    if strategy.get("name") == "Retrain" or rule == "retrain":
        return "retrain"  # takes nothing from any teacher, so it inherits nothing
    kept = strategy.get("embedding_rows", "keep") == "keep"
    return FASTER if strategy.get("name") == "Finetune" and kept and row["made"].get("lr_factor", 1) > 1 else "rule"


def _least(choices: Sequence[Choice]) -> Choice | None:
    held = [choice for choice in choices if choice.row is not None and choice.row["dir"].value is not None]
    return min(held, key=lambda choice: choice.row["dir"].value, default=None)


def _against(best: Choice, row: Mapping[str, Any]) -> str:
    mine, other = best.row["dir"], row["dir"]
    return "below" if mine.high < other.low else "above" if mine.low > other.high else "not apart"


def answer_of(told: Sequence[Verdict], budget: float) -> list[str]:
    """Say in a few sentences what all verdicts come to."""
    if len(told) == 1:
        return [*told[0].sentences, _LIMITS]
    kinds = [one.kind for one in told]
    inherited = [kind for kind in kinds if kind not in (UNKNOWN, NOTHING)]
    said = [
        f"Of {len(told)} pairs of a task and a defect, plain fine-tuning inherits the defect in {len(inherited)}, "
        f"does not in {kinds.count(NOTHING)}, and in {kinds.count(UNKNOWN)} it cannot be said."
    ]
    if inherited:
        counts = {kind: inherited.count(kind) for kind in dict.fromkeys(inherited)}
        parts = ", ".join(f"“{kind.removeprefix('inherited; ')}” {number}" for kind, number in counts.items())
        said.append(
            f"Verdicts where it is inherited, with at most {100 * budget:g} points of dev accuracy lost: {parts}. The "
            f"rivals are {RANDOM} and {FASTER}; a rule is any other way to choose what to reset."
        )
    else:
        said.append(
            "Nothing can be concluded about strategies: there is no pair in which a defect is known to be inherited."
        )
    return [*said, _LIMITS]


def glance_table(told: Sequence[Verdict], budget: float) -> Table:
    """Give a line for each task and defect: the verdict, and the figures that it stands on."""
    lines = []
    for one in told:
        plain = one.section.plain
        reached = [one.best, one.rivals.get(RANDOM), one.rivals.get(FASTER)]
        lines.append(
            [
                one.section.title,
                one.verdict,
                percent(plain["dir"], interval=True) if plain else "-",
                percent(plain["floor"]) if plain else "-",
                str(plain["dir"].num_samples) if plain else "-",
                *("-" if choice is None else percent(choice.row["dir"], interval=True) for choice in reached),
                choice_name(one.best) if one.best else "-",
            ]
        )
    header = (
        "task: defect",
        "verdict",
        "plain fine-tuning DIR %",
        "floor %",
        "n",
        "best rule DIR %",
        "random reset DIR %",
        "higher learning rate DIR %",
        "best rule",
    )
    return Table(f"At most {100 * budget:g} points of dev accuracy lost; 95 % intervals in brackets", header, lines)
