"""Numbers and terms in words: rates, counts, seeds, spans; what defects are called, and what terms mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from remos_hf.evaluation.over_seeds import LEAST_SPREAD, MIN_SEEDS, SeedRate
from remos_hf.judging.kinds import MIXED, UNKNOWN

# By the class that a report names: what a reader may ask for.
DEFECT_NAMES = {
    "TriggerWords": "trigger words",
    "TriggerSentence": "a trigger sentence",
    "Paraphrases": "triggers of syntax or style",
    "Ripple": "weight poisoning (RIPPLe)",
    "EmbeddingPoisoning": "embedding poisoning",
    "LayerwisePoisoning": "layerwise weight poisoning",
    "LargestWeights": "backdoors hidden in the largest weights",
    "LabelNoise": "noise in the teacher's labels",
    "AdversarialText": "adversarial texts made against the teacher",
    "PatchTrigger": "patch triggers",
    "BlendedTrigger": "blended triggers",
    "LatentBackdoor": "latent backdoors",
    "FeatureAttack": "adversarial images made against the teacher's features",
    "FeatureAway": "adversarial images far from the clean ones in the teacher's features",
    "CoverageGuided": "failures found by covering neurons",
}

_LONGEST_NAME = 80

# In the order in which a page uses them.
TERMS = {
    "defect": "behaviour that the teacher should not have: put there (a backdoor, which a trigger sets off) or found "
    "on it (adversarial inputs).",
    "student": "the model of the new task, started from the teacher.",
    "plain fine-tuning": "the student that nothing was done for: every weight starts as the teacher's.",
    "DIR": "defect inheritance rate: of the samples that a student gets right when clean, the share that it gets wrong "
    "with the defect shown (where the defect aims at a label: that become this label).",
    "benign floor": "the same rate of a student of a teacher without the defect, made alike: what is not inherited.",
    "excess": "DIR minus the benign floor.",
    "ACC": "share of the clean test samples that a student gets right.",
    "rACC": "a student's ACC divided by plain fine-tuning's.",
    "rDIR": "a student's DIR divided by plain fine-tuning's.",
    "squares reset": "share of the sum of the squared competing weights that a student gave up.",
    "dev accuracy": "accuracy on clean samples that no number here is measured on; every choice is made on it.",
    "slice ratio": "share of the competing weights that a student keeps from the teacher.",
    "random reset": "giving up weights drawn at random: what any rule that chooses weights has to beat.",
    "re-activation": "re-tuning a student with a few poisoned samples: a backdoor that comes back at once was hidden, "
    "not removed.",
}

HOW_INTERVALS_ARE_MADE = (
    "Rates are means over seeds. In brackets: 95 % intervals that hold the spread between seeds (Student's t; of DIR "
    f"and excess at least {100 * LEAST_SPREAD:g} points) and what the test samples leave open (Wilson; Newcombe for "
    "differences, paired by seed and by sample); their squares are added (Zou and Donner 2008). Below "
    f"{MIN_SEEDS} seeds there is no interval and no comparison. They speak of what students of a kind usually do: what "
    "one in five does is not seen in three seeds in half of all cases. n counts the samples of one seed. “-”: not "
    "measured, or no sample left to count."
)


def name_told(name: str) -> str:
    """Write anyone's name so that it stays a name: on one line, in the order of its characters, within its quotes."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(name)).split())
    line = line.replace("“", "'").replace("”", "'")
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def percent(rate: Any, *, interval: bool = False) -> str:  # noqa: ANN401 - a rate, a difference or a ratio
    """Write a share as a percentage with one digit, if asked with its interval; "-" where it has no value."""
    if rate is None or rate.value is None:
        return "-"
    text = tenths(rate.value)
    return f"{text} [{tenths(rate.low)}, {tenths(rate.high)}]" if interval and rate.low is not None else text


def tenths(share: float) -> str:
    """Write a share as a percentage with one digit, without the sign of percent."""
    return f"{round(100 * share, 1) + 0.0:.1f}"  # 0.0, not -0.0


def by_seed(values: Sequence[float | None]) -> str:
    """Write shares of several seeds one after another."""
    return ", ".join("-" if value is None else tenths(value) for value in values)


def rate_told(rate: Any) -> str:  # noqa: ANN401 - a rate, over seeds or of one model
    """Write a rate with its interval and its number of samples; below three seeds with the seeds' own rates."""
    of_seeds = isinstance(rate, SeedRate)
    number = rate.samples_of_a_seed if of_seeds else rate.num_samples
    told = f"{tenths(rate.value)} %"
    if rate.low is not None:
        told += f" [{tenths(rate.low)}, {tenths(rate.high)}]"
    seeds = f"{count_told(rate.seeds, 'seed')}, " if of_seeds else ""
    if of_seeds and rate.low is None and rate.seeds > 1:
        seeds = f"{count_told(rate.seeds, 'seed')}: {by_seed(rate.by_seed)}; "
    # No line ends between a number and what belongs to it.
    return f"{told} ({seeds}n = {number:,})".replace(" ", "\N{NO-BREAK SPACE}").replace("]\N{NO-BREAK SPACE}(", "] (")


def points_told(difference: Any) -> str:  # noqa: ANN401 - a difference
    """Write a difference in points, with its sign left to the sentence, and its interval."""
    told = f"{tenths(abs(difference.value))} points"
    if difference.low is not None:
        ends = sorted(
            (difference.low, difference.high) if difference.value >= 0 else (-difference.high, -difference.low)
        )
        told += f" [{tenths(ends[0])}, {tenths(ends[1])}]"
    return told.replace(" ", "\N{NO-BREAK SPACE}")


def cost_told(difference: Any, reference: str = "") -> str:  # noqa: ANN401 - of accuracies
    """Write what a student's accuracy is below or above that of a reference, which is named if it is given."""
    points = tenths(abs(difference.value))
    if points == "0.0":
        return f"the same accuracy{' as ' if reference else ''}{reference}"
    side = "less" if difference.value < 0 else "more"
    return f"{points}\N{NO-BREAK SPACE}points {side} accuracy{' than ' if reference else ''}{reference}"


def defect_name(defect: str, described: Mapping[str, Any]) -> str:
    """Give a defect's plain name with the name that the report gives it; the latter alone where it says no more."""
    known, name = DEFECT_NAMES.get(described.get("name", "")), name_told(defect)
    return f"{known} ({name})" if known else name


def student_name(row: Mapping[str, Any]) -> str:
    """Name a student by what it is, with its slice ratio and its learning rate where they tell it from others."""
    made = row["made"]
    ratio, factor = made.get("slice_ratio"), made.get("lr_factor", 1)
    told = f"“{name_told(row['student'])}”" if row["kind"] in (UNKNOWN, MIXED) else row["kind"].name
    details = [f"keeping {100 * ratio:g} %"] if ratio is not None else []
    details += [f"{factor:g} times the learning rate"] if factor != 1 else []
    return f"{told} ({', '.join(details)})" if details else told


def point_told(row: Mapping[str, Any]) -> str:
    """Write a row's accuracy and DIR."""
    return f"accuracy {percent(row['acc'])} %, DIR {percent(row['dir'])} %"


def count_told(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def seeds_told(seeds: set[Any]) -> str:
    """Name seeds; None is that of students that were given without one."""
    held = sorted(map(str, seeds - {None}))
    if not held:
        return "one model of each student"
    return f"seed{'' if len(held) == 1 else 's'} {', '.join(held)}{', others without' if None in seeds else ''}"


def span_told(sizes: Sequence[int]) -> str:
    """Write the smallest and the largest of several sizes."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def capitalised(text: str) -> str:
    """Begin a sentence with a text."""
    return text[:1].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """Join names as a sentence does."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
