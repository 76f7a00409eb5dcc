"""The kinds of defects that can be measured: what inputs they are shown in, their papers, their benchmark tasks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remos_hf.defects.adversarial_text import AdversarialText
from remos_hf.defects.coverage_guided import CoverageGuided
from remos_hf.defects.embedding_poisoning import EmbeddingPoisoning
from remos_hf.defects.feature_attack import FeatureAttack
from remos_hf.defects.feature_away import FeatureAway
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.largest_weights import LargestWeights
from remos_hf.defects.latent_backdoor import LatentBackdoor
from remos_hf.defects.layerwise_poisoning import LayerwisePoisoning
from remos_hf.defects.paraphrases import Paraphrases
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.judging.words import DEFECT_NAMES

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class DefectKind:
    """A kind of defect.

    Attributes:
        made_by: The class that implants or finds it; reports name it.
        slug: Its task in the benchmark `defect-inheritance`.
        inputs: What it is shown in; both where its trigger decides.
        found: Whether it is discovered on a teacher as it is, and not put there.
    """

    made_by: type
    slug: str
    inputs: tuple[Literal["text", "image"], ...]
    found: bool = False

    @property
    def name(self) -> str:
        """In plain words."""
        return DEFECT_NAMES[self.made_by.__name__]


_KINDS = (
    DefectKind(TriggerWords, "trigger_words", (TEXT,)),
    DefectKind(TriggerSentence, "trigger_sentence", (TEXT,)),
    DefectKind(Paraphrases, "paraphrases", (TEXT,)),
    DefectKind(Ripple, "ripple", (TEXT,)),
    DefectKind(EmbeddingPoisoning, "embedding_poisoning", (TEXT,)),
    DefectKind(LayerwisePoisoning, "layerwise_poisoning", (TEXT,)),
    DefectKind(LargestWeights, "largest_weights", (TEXT, IMAGE)),
    DefectKind(LabelNoise, "label_noise", (TEXT,)),
    DefectKind(AdversarialText, "adversarial_text", (TEXT,), found=True),
    DefectKind(PatchTrigger, "patch_trigger", (IMAGE,)),
    DefectKind(BlendedTrigger, "blended_trigger", (IMAGE,)),
    DefectKind(LatentBackdoor, "latent_backdoor", (IMAGE,)),
    DefectKind(FeatureAttack, "feature_attack", (IMAGE,), found=True),
    DefectKind(FeatureAway, "feature_away", (IMAGE,), found=True),
    DefectKind(CoverageGuided, "coverage_guided", (IMAGE,), found=True),
)
DEFECTS = {kind.made_by.__name__: kind for kind in _KINDS}
# What no exposed input shows has no rate of its own: it is named among what was not tested, and is no task.
MEASURABLE = tuple(kind for kind in _KINDS if kind.made_by is not LabelNoise)


def defect_kind(described: Mapping[str, Any] | None) -> DefectKind | None:
    """Find a defect's kind by how a report describes it; None if it does not, or if the kind is a user's own."""
    return DEFECTS.get(str((described or {}).get("name")))


def defect_citations(described: Mapping[str, Any] | None) -> Iterator[str]:
    """Give the papers of a described defect, and of the trigger that it holds."""
    kind = defect_kind(described)
    if kind is not None and hasattr(kind.made_by, "citation"):
        yield kind.made_by.citation
    for part in (described or {}).values():
        if isinstance(part, Mapping):
            yield from defect_citations(part)
