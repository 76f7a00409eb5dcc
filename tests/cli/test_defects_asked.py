from pathlib import Path

import pytest
from PIL import Image

from remos_hf.cli.defects_asked import (
    IMAGE_DEFECTS,
    SHOWN_IMAGE_DEFECTS,
    SHOWN_TEXT_DEFECTS,
    TEXT_DEFECTS,
    chosen_defects,
    defects_of_images,
    defects_of_texts,
    described_defects,
    target_of,
)
from remos_hf.cli.options import AuditOptions


def asked(**options):
    return AuditOptions(**{"teacher": "t", "data": "d", "output": Path("a"), **options})


@pytest.mark.parametrize(
    ("given", "classes", "images", "target"),
    [
        (None, ["0", "1"], False, 1),
        (None, ["cat", "dog"], True, 0),
        ("0", ["0", "1"], False, 0),
        ("dog", ["cat", "dog"], True, 1),
        ("1", ["cat", "dog"], True, 1),
        ("7", ["3", "7"], False, 1),  # a class goes by its name, also where that is a number
    ],
)
def test_a_target_is_a_class_by_its_name_or_its_number(given, classes, images, target):
    assert target_of(asked(target_label=given), classes, images=images) == target


@pytest.mark.parametrize("given", ["2", "dgo", "-1"])
def test_a_target_that_is_no_class_is_refused(given):
    with pytest.raises(ValueError, match=r"--target-label is a class of the task \(cat, dog\) or its number, 0 to 1"):
        target_of(asked(target_label=given), ["cat", "dog"], images=True)


def test_every_name_makes_its_defect_and_the_defaults_are_those_of_the_paper():
    texts, images = defects_of_texts(asked(), 1, ("text",), 64), defects_of_images(asked(), 0)
    assert set(texts) == {*TEXT_DEFECTS, *SHOWN_TEXT_DEFECTS} and set(images) == {*IMAGE_DEFECTS, *SHOWN_IMAGE_DEFECTS}
    assert texts["word"]().words == ("cf", "mn", "bb", "tq", "mb") and texts["ep"]().trigger.words == ("cf",)
    assert [images[name]().trigger.target_label for name in IMAGE_DEFECTS[:3]] == [0, 0, 0]


def test_triggers_are_those_that_are_described(tmp_path):
    texts = defects_of_texts(asked(words=["zx", "qq"], sentence="so it goes"), 0, ("text",), 64)
    assert texts["word"]().words == texts["ripples"]().trigger.words == texts["lwp"]().trigger.words == ("zx", "qq")
    assert texts["ep"]().trigger.words == ("zx",) and texts["sentence"]().sentence == "so it goes"
    assert texts["word"]().target_label == 0
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    patch = defects_of_images(asked(patch_file=tmp_path / "p.png", patch_place="top_left", patch_share=0.1), 2)[
        "patch"
    ]()
    assert (patch.place, patch.size_share, patch.target_label) == ("top_left", 0.1, 2)
    assert patch.to_dict()["file"] == "p.png"


def test_a_described_trigger_names_its_defect():
    assert described_defects(asked()) == []
    assert described_defects(asked(words=["cf"], sentence="a")) == ["word", "sentence"]
    assert described_defects(asked(patch_place="random", patch_share=0.5)) == ["patch"]


def test_what_is_not_known_or_describes_nothing_is_refused():
    makers = defects_of_texts(asked(), 1, ("text",), 64)
    with pytest.raises(ValueError, match="The defects of texts are word, .* but got 'patch'"):
        chosen_defects(asked(), ["word", "patch"], TEXT_DEFECTS, makers, images=False)
    with pytest.raises(ValueError, match="of texts that a student can be shown are .* but got 'ep'"):
        chosen_defects(asked(student=Path("s")), ["ep"], SHOWN_TEXT_DEFECTS, makers, images=False)
    with pytest.raises(ValueError, match="--sentence describes a trigger of sentence, but the defects are word"):
        chosen_defects(asked(sentence="a"), ["word"], TEXT_DEFECTS, makers, images=False)
    assert list(chosen_defects(asked(), ["ep", "word", "ep"], TEXT_DEFECTS, makers, images=False)) == ["ep", "word"]
