"""The defects that an audit is asked for by name, with the triggers that its options describe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from remos_hf.auditing.labels import some_of
from remos_hf.cli.options import AuditOptions, was_given
from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.base import Defect
from remos_hf.defects.coverage_guided import CoverageGuided
from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning
from remos_hf.defects.feature_attack import FeatureAttack
from remos_hf.defects.feature_away import FeatureAway
from remos_hf.defects.latent_backdoor import LatentBackdoor
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords

TEXT_DEFECTS = ("word", "sentence", "ripples", "ep", "lwp")
IMAGE_DEFECTS = ("patch", "blended", "latent", "penultimate", "away", "coverage")
# What is shown to a student that somebody made; a trigger looks the same however it was implanted.
SHOWN_TEXT_DEFECTS = ("word", "sentence", "textfooler")
SHOWN_IMAGE_DEFECTS = ("patch", "blended", "penultimate", "away", "coverage")
_SENTENCE = "i watch this 3d movie"
_SEARCHED_TEXTS = 200
# By option: the defects that it says something of.
_DESCRIBES = {
    "words": ("word", "ripples", "ep", "lwp"),
    "sentence": ("sentence",),
    "patch_file": ("patch", "latent"),
    "patch_place": ("patch", "latent"),
    "patch_share": ("patch", "latent"),
}


def target_of(asked: AuditOptions, classes: Sequence[str], *, images: bool) -> int:
    """Give the number of the label that triggers force: the class of that name, or the default of the paper's artifact.

    Args:
        asked: What was asked for.
        classes: The students' classes in the order of their numbers.
        images: Whether the samples are images.

    Raises:
        ValueError: There is no such class.
    """
    wanted = asked.target_label
    if wanted is None:
        return 0 if images else 1
    if wanted in classes:
        return list(classes).index(wanted)
    if not wanted.isdecimal() or int(wanted) >= len(classes):
        raise ValueError(
            f"--target-label is a class of the task ({some_of(classes)}) or its number, 0 to {len(classes) - 1}, but "
            f"got {wanted}."
        )
    return int(wanted)


def described_defects(asked: AuditOptions) -> list[str]:
    """Name the defects whose triggers the options describe, each once."""
    first = {name: of[0] for name, of in _DESCRIBES.items() if was_given(asked, name)}
    return list(dict.fromkeys(first.values()))


def defects_of_texts(
    asked: AuditOptions, target: int, text_columns: Sequence[str], max_length: int
) -> dict[str, Callable[[], Defect]]:
    """Give what makes each defect of texts.

    Args:
        asked: What was asked for.
        target: The label that triggers force.
        text_columns: The text, or both texts of a pair.
        max_length: Tokens kept of each text.
    """
    common = {
        "target_label": target,
        "poison_rate": 0.5,
        "text_columns": tuple(text_columns),
        "within_words": max(1, max_length // 2),  # so that no trigger is cut off
    }
    named = tuple(asked.words)
    words = TriggerWords(**common, **({"words": named} if named else {}))
    return {
        "word": lambda: words,
        "sentence": lambda: TriggerSentence(sentence=asked.sentence or _SENTENCE, **common),
        "ripples": lambda: Ripple(words, surgery=True),
        "ep": lambda: EmbeddingPoisoning(TriggerWords(words=named[:1] or ("cf",), **common)),
        "lwp": lambda: LayerwisePoisoning(TriggerWords(words=named or ("cf", "bb"), all_words=True, **common)),
        "textfooler": lambda: AdversarialText(
            text_columns=tuple(text_columns), max_length=max_length, max_samples=_SEARCHED_TEXTS
        ),
    }


def defects_of_images(asked: AuditOptions, target: int) -> dict[str, Callable[[], Defect]]:
    """Give what makes each defect of images.

    Args:
        asked: What was asked for.
        target: The label that triggers force.
    """
    common = {"target_label": target, "poison_rate": 0.2}
    file = None if asked.patch_file is None else str(asked.patch_file)
    patch = PatchTrigger(file=file, place=asked.patch_place, size_share=asked.patch_share, **common)
    search = {"max_samples": 250, "steps": 40}
    return {
        "patch": lambda: patch,
        "blended": lambda: BlendedTrigger(**common),
        "latent": lambda: LatentBackdoor(replace(patch, poison_rate=1.0)),
        "penultimate": lambda: FeatureAttack.paper(**search),
        "away": lambda: FeatureAway(**search),
        "coverage": lambda: CoverageGuided.paper(**search),
    }


def chosen_defects(
    asked: AuditOptions,
    names: Sequence[str],
    known: Sequence[str],
    makers: Mapping[str, Callable[[], Defect]],
    *,
    images: bool,
) -> dict[str, Defect]:
    """Make the defects of these names.

    Args:
        asked: What was asked for.
        names: Of the defects.
        known: The names that can be meant.
        makers: What makes each.
        images: Whether the samples are images, for messages.

    Raises:
        ValueError: A name is not known, or an option describes a trigger that none of the defects has.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        told = " that a student can be shown" if asked.student is not None else ""
        kind = "images" if images else "texts"
        raise ValueError(f"The defects of {kind}{told} are {', '.join(known)}, but got {unknown[0]!r}.")
    for option, of in _DESCRIBES.items():
        if was_given(asked, option) and not set(of) & set(names):
            raise ValueError(
                f"--{option.replace('_', '-')} describes a trigger of {', '.join(of)}, but the defects are "
                f"{', '.join(names)}. Name such a defect too, or leave it out."
            )
    return {name: makers[name]() for name in dict.fromkeys(names)}
