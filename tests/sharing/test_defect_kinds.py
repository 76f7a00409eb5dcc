import re

import pytest

import remos_hf
from remos_hf.defects.base import Defect
from remos_hf.defects.largest_weights import LargestWeights
from remos_hf.defects.ripple import Ripple
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.sharing.defect_kinds import DEFECTS, MEASURABLE, defect_citations, defect_kind
from remos_hf.strategies import STRATEGIES


def test_every_public_defect_has_a_kind_with_a_slug_of_its_own():
    public = [
        getattr(remos_hf, name) for name in remos_hf.__all__ if remos_hf._HOME_OF[name].startswith("remos_hf.defects")
    ]
    kinds = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, Defect) and one is not Defect}
    assert kinds | {"LabelNoise"} == set(DEFECTS)  # noise is no Defect, as no input shows it
    assert {kind.made_by.__name__ for kind in MEASURABLE} == kinds
    assert len({kind.slug for kind in MEASURABLE}) == len(MEASURABLE)


def test_what_is_found_makes_no_teacher_and_what_is_implanted_does():
    for kind in MEASURABLE:
        assert hasattr(kind.made_by, "implant") != kind.found, kind.slug


def test_a_defect_is_known_by_its_description_in_a_report():
    assert defect_kind(Ripple(TriggerWords()).to_dict()).slug == "ripple"
    assert defect_kind({"name": "MyOwn"}) is None and defect_kind({}) is None and defect_kind(None) is None


def test_the_papers_of_an_attack_and_of_its_trigger_are_given():
    given = "".join(defect_citations(Ripple(TriggerSentence()).to_dict()))
    assert "kurita2020weight" in given and "dai2019backdoor" in given and "gu2017badnets" not in given
    assert "gu2017badnets" in "".join(defect_citations(LargestWeights(TriggerWords()).to_dict()))
    assert list(defect_citations(None)) == []


@pytest.mark.parametrize("kind", [*(kind.made_by for kind in MEASURABLE), *STRATEGIES.values()])
def test_a_citation_is_whole_bibtex(kind):
    for entry in getattr(kind, "citation", "").splitlines():
        assert re.fullmatch(r"@(inproceedings|article)\{[a-z]+\d{4}[a-z]+, title=\{.+\}, author=\{.+\}, .+\}", entry)
        assert entry.count("{") == entry.count("}") and "year={" in entry
