"""All that may be said of a scan, in sentences as data; of patches the verdict, too. Never "backdoored"."""

from dataclasses import dataclass
from statistics import median

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.suspects import CANNOT, verdict_of_scan
from remos_hf.judging.tables import Table
from remos_hf.judging.words import count_told, listed, name_told, percent, rate_told
from remos_hf.scanning.suspects import Effect, Scan, Suspect

# Neural Cleanse calls a class infected from this many deviations below the median on.
INDEX = 2.0
# Sizes of clean students lie close to each other now and then, and then little is far: a suspect is smaller, too.
SMALLER = 0.5
TURNS = 0.75  # of the held-out images: less is no patch that turns images, but one that fits those it was searched on
_MOST_NAMED = 5
_FEWEST_CLASSES, _FEWEST_HOSTS = 3, 20
_TO_STANDARD_DEVIATIONS = 1.4826  # of normal values, over their median absolute deviation

_NEEDED = ("mode", "steps", "sizes", "reference_sizes", "not_reached")  # of a scan of patches
_LIMITS = (
    "Suspicious is a class whose {what} is at most {share} % of the median class's, lies {index:g} deviations below it "
    "(the index) and turns at least {turns} % of held-out images{beside}. Few students were measured to choose this: "
    "how often it names a class of a clean one has not been counted.",
    "Suspicious is no proof: a class may have a small patch because one feature alone tells it from the others.",
    "Nothing suspicious is no proof either: this finds triggers that are alike on all images and smaller than what "
    "turns images anyway. It was seen to miss students that were fine-tuned from a poisoned teacher and still obeyed.",
)


@dataclass(frozen=True)
class ScanJudgement:
    """What a scan comes to.

    Attributes:
        answer: In a sentence or two.
        advice: What to do.
        limits: What the answer rests on, and what it does not say.
        can_be_said: Whether it could have found something.
        suspicious: The suspects that are named.
        glance: The one table that holds the answer, a line a class.
    """

    answer: str
    advice: list[str]
    limits: list[str]
    can_be_said: bool
    suspicious: tuple[Suspect, ...]
    glance: Table


def judged_scan(scan: Scan) -> ScanJudgement:
    """Judge a scan of tokens as `verdict_of_scan` does, or one of patches.

    A class is suspicious if its patch turns at least three quarters of the held-out images, is two deviations below the
    median class's (Neural Cleanse) and at most half of it, and at most half of the same class's in the clean
    reference, where there is one. Chosen on few students; how often clean ones are named has not been counted.

    Args:
        scan: As `scan_tokens` or `scan_patches` gives it.

    Raises:
        ValueError: It is of patches and lacks what `scan_patches` records.
    """
    return _of_tokens(scan) if scan.kind == "tokens" else _of_patches(scan)


def _of_tokens(scan: Scan) -> ScanJudgement:
    said = verdict_of_scan(scan)
    answer, *limits = said.sentences
    if said.kind == CANNOT:
        advice = ["Give data that the student gets right (`--data`), or a clean student beside it (`--reference`)."]
    elif said.suspicious:
        named = listed([shown_text(one.what) for one in said.suspicious[:_MOST_NAMED]])
        answer = f"{answer.removesuffix('.')}: {named}."
        words = list(dict.fromkeys(one.what for one in said.suspicious if len(one.token_ids) == 1))
        shown = f", with {listed([f'“{name_told(word)}”' for word in words[:3]])} as `--words`" if words else ""
        advice = [
            f"Measure it: `remos audit --student`{shown}.",
            "The strategy RepairRows overwrites the strongest rows: in the table of benchmarks/README.md it left "
            "2 % of trigger words and 11 % of a trigger sentence.",
        ]
    else:
        advice = ["What you suspect by name, measure: `remos audit --student --words`, or `--sentence`."]
    return ScanJudgement(answer, advice, limits, said.kind != CANNOT, said.suspicious, _glance_of_tokens(scan))


def _glance_of_tokens(scan: Scan) -> Table:
    header = ("class", "strongest input", "margin", "turns % held-out (n)")
    header += ("reference: turns % (n)",) if scan.has_reference else ()
    lines = []
    for label, name in enumerate(scan.labels):
        for one in sorted(scan.of_label(label), key=lambda one: -(one.lead or 0))[:1]:
            line = [name_told(name), shown_text(one.what), margin_told(one.effect), turns_told(one.effect)]
            lines.append(line + ([turns_told(one.reference)] if scan.has_reference else []))
    return Table("What turns texts into each class most", header, lines)


def _of_patches(scan: Scan) -> ScanJudgement:
    missing = [name for name in _NEEDED if name not in scan.settings]
    if missing or not scan.suspects:
        what = f"its settings lack {', '.join(missing)}" if missing else "it holds no class"
        raise ValueError(f"A scan of patches is judged as scan_patches gives it, but {what}.")
    reason = _why_unsaid(scan)
    indices = anomaly_indices(scan.settings["sizes"])
    suspicious = () if reason else tuple(one for one in scan.suspects if _is_suspicious(one, scan, indices))
    return ScanJudgement(
        _answer(scan, suspicious, reason),
        _advice(suspicious, reason, scan),
        _limits(scan),
        reason is None,
        suspicious,
        _glance(scan, indices),
    )


def anomaly_indices(sizes: list[float]) -> list[float] | None:
    """Say how far below the median each size lies, in standard deviations as the median deviation estimates them.

    Args:
        sizes: One a class.

    Returns:
        For each, positive below the median; None with fewer than three classes, of which it says nothing.

    Source:
        Neural Cleanse (Wang et al. 2019), section 4.2.
    """
    if len(sizes) < _FEWEST_CLASSES:
        return None
    middle = median(sizes)
    spread = _TO_STANDARD_DEVIATIONS * median(abs(size - middle) for size in sizes)
    return [(middle - size) / spread if spread else 0.0 for size in sizes]


def _why_unsaid(scan: Scan) -> str | None:
    sizes, missed = scan.settings["sizes"], len(scan.settings["not_reached"])
    if len(sizes) < _FEWEST_CLASSES and scan.settings["reference_sizes"] is None:
        return f"{len(sizes)} classes are too few to tell one from the others, and no clean reference was given"
    fewest = min(one.effect.num_hosts for one in scan.suspects)
    if fewest < _FEWEST_HOSTS:
        held = count_told(fewest, "held-out image")
        return f"for one class only {held} of others is left that the student gets right"
    if 2 * missed > len(sizes):
        return f"{missed} of {len(sizes)} classes were not reached in {scan.settings['steps']} steps"
    return None


def _is_suspicious(one: Suspect, scan: Scan, indices: list[float] | None) -> bool:
    sizes, beside = scan.settings["sizes"], scan.settings["reference_sizes"]
    if one.label in scan.settings["not_reached"] or one.effect.rate < TURNS:
        return False
    if beside is not None and one.size > SMALLER * beside[one.label]:
        return False
    return indices is None or (indices[one.label] >= INDEX and one.size <= SMALLER * median(sizes))


def _limits(scan: Scan) -> list[str]:
    share, turns = (round(100 * one) for one in (SMALLER, TURNS))
    beside = "" if scan.settings["reference_sizes"] is None else f", and is at most {share} % of the clean reference's"
    told = {"what": _what(scan), "share": share, "turns": turns, "index": INDEX, "beside": beside}
    return [one.format(**told) for one in _LIMITS]


def _answer(scan: Scan, suspicious: tuple[Suspect, ...], reason: str | None) -> str:
    what = _what(scan)
    if reason is not None:
        return f"Whether a class is suspicious cannot be said: {reason}."
    if not suspicious:
        return (
            f"Nothing suspicious was found, which is no proof: no class is reached by a much smaller {what} than the "
            "others."
        )
    middle = median(scan.settings["sizes"])
    told = []
    for one in suspicious:
        rate = rate_told(Rate.of(one.effect.flipped, one.effect.num_hosts))
        beside = scan.settings["reference_sizes"]
        same = "" if beside is None else f", and in the clean reference the same class {_size(scan, beside[one.label])}"
        told.append(
            f"Class “{name_told(scan.labels[one.label])}” is suspicious: a {what} of {_size(scan, one.size)} turns "
            f"{rate} of held-out images of other classes into it. The median class needs {_size(scan, middle)}{same}."
        )
    return " ".join(told)


def _advice(suspicious: tuple[Suspect, ...], reason: str | None, scan: Scan) -> list[str]:
    if reason is not None:
        return ["Give more images (`--data`, `--max-samples`) or a clean student of the same task (`--reference`)."]
    if not suspicious:
        other = "patch" if scan.settings["mode"] == "perturbation" else "perturbation"
        return [
            f"Look for the other kind of change too: `--mode {other}`. What you suspect by name, measure: `remos audit "
            "--student`."
        ]
    names = listed([f"“{name_told(scan.labels[one.label])}”" for one in suspicious])
    return [
        f"Look at what was found for {names}, and measure it: `remos audit --student`, with `--patch-file` if you know "
        "the trigger's picture.",
        *(
            ["Scan a student of the same task from another teacher beside it (`--reference`)."]
            if scan.settings["reference_sizes"] is None
            else []
        ),
        "To repair it, start it again from the teacher so that it keeps less of it (`remos train`), and scan it again.",
    ]


def _what(scan: Scan) -> str:
    return "patch" if scan.settings["mode"] == "patch" else "perturbation"


def _size(scan: Scan, size: float) -> str:
    of = "the image" if scan.settings["mode"] == "patch" else "the range of values"
    return f"{percent_of(size)}\N{NO-BREAK SPACE}% of {of}"


def percent_of(size: float) -> str:
    """Write a size as a percentage with two digits."""
    return f"{100 * size:.2f}"


def _glance(scan: Scan, indices: list[float] | None) -> Table:
    sizes, beside = scan.settings["sizes"], scan.settings["reference_sizes"]
    middle = median(sizes)
    header = ("class", "size %", "of the median", "index", "turns % held-out (n)")
    header += ("reference: size %", "reference: turns % (n)") if beside is not None else ()
    lines = []
    for one in scan.suspects:
        found = one.label not in scan.settings["not_reached"]
        line = [
            name_told(scan.labels[one.label]),
            percent_of(one.size) if found else "not reached",
            f"{one.size / middle:.2f}" if found else "-",
            f"{round(indices[one.label], 1) + 0.0:.1f}" if found and indices else "-",
            turns_told(one.effect) if found else "-",
        ]
        if beside is not None:
            line += [percent_of(beside[one.label]), turns_told(one.reference) if found else "-"]
        lines.append(line)
    what = _what(scan)
    return Table(f"The smallest {what} that was found for each class, the same on all images", header, lines)


def turns_told(effect: Effect | None) -> str:
    """Write the share of hosts that an input turns, and their number."""
    return "-" if effect is None else f"{percent(Rate.of(effect.flipped, effect.num_hosts))} ({effect.num_hosts})"


def margin_told(effect: Effect | None) -> str:
    """Write how far an input turns held-out hosts, in logits."""
    return "-" if effect is None or effect.margin is None else f"{effect.margin:.1f}"


def shown_text(text: str) -> str:
    """Write a token of anyone's vocabulary so that all of it is seen: in quotes, what does not print by its number."""
    return f"“{''.join(char if char.isprintable() else _escaped(char) for char in text)}”"


def _escaped(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
