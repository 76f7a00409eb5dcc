import base64
import io

import pytest
import torch
from PIL import Image
from torch import nn

from remos_hf.adapters.images import ImageInput
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.scanning.patches import Change, scan_patches
from remos_hf.scanning.suspects import Scan
from tests import tiny

IMAGES = ImageInput(size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3, crop_share=1.0)
QUICK = {"images": IMAGES, "steps": 3, "progress": False}
WHOLE = {"images": IMAGES, "steps": 80, "batch_size": 16, "progress": False}


class Quadrants(nn.Module):
    """Tells which quadrant is the brightest; says `planted` where a trigger is that no clean image has.

    That is a white pixel, or with `woven` a faint chequerboard over the whole image.
    """

    def __init__(self, planted=None, woven=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.planted, self.woven = planted, woven

    def forward(self, inputs):
        pixels = IMAGES.denormalised(inputs)
        logits = self.scale * nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4).flatten(1)
        if self.planted is None:
            return logits
        grey = pixels.mean(1)
        shown = 20 * (grey[:, 4, 2] - 0.8)
        if self.woven:
            cells = (torch.arange(8)[:, None] + torch.arange(8)) % 2
            shown = 200 * ((grey * (2 * cells - 1)).mean((1, 2)) - 0.04)
        return logits + 30 * torch.sigmoid(shown)[:, None] * nn.functional.one_hot(torch.tensor(self.planted), 4)


def pictures(number=80, seed=0):
    """Give normalised images and their labels: noise, and one quadrant brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    pixels = 0.3 * torch.rand(number, 3, 8, 8, generator=generator)
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        pixel[:, row : row + 4, column : column + 4] += 0.2
    return IMAGES.normalised(pixels), labels


@pytest.fixture(scope="module")
def planted():
    return scan_patches(Quadrants(2), [pictures()], **WHOLE)


def test_the_planted_class_has_the_smallest_patch_and_it_lies_where_it_was_planted(planted):
    sizes = planted.settings["sizes"]
    assert min(sizes) == sizes[2] < 0.5 * min(sizes[:2] + sizes[3:])
    assert "strongest in rows 5 to 5 of 8, columns 3 to 3 of 8" in planted.suspects[2].what
    assert planted.suspects[2].effect.rate > 0.8 and planted.suspects[2].size == sizes[2]
    assert planted.settings["not_reached"] == []


def test_its_rates_are_of_images_that_were_not_searched_on(planted):
    assert {one.effect.num_hosts for one in planted.suspects} == {30}  # half of the 60 of other classes


def test_a_scan_is_decided_by_its_seed_and_leaves_student_and_randomness_alone():
    student, (inputs, labels) = tiny.ConvNet().train(), pictures(24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    first, again, other = (scan_patches(student, [(inputs, labels)], seed=seed, **QUICK) for seed in (3, 3, 4))
    assert first.to_dict() == again.to_dict()
    assert [one.margin for one in other.suspects] != [one.margin for one in first.suspects]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert student.training and student.norm.training and not student.head.weight.requires_grad
    assert all(one.grad is None for one in student.parameters()) and student.conv.weight.requires_grad


def test_images_that_the_student_gets_wrong_are_no_hosts():
    inputs, labels = pictures()
    wrong = labels.clone()
    wrong[:40] = (labels[:40] + 1) % 4
    hosts = [
        sum(one.effect.num_hosts for one in scan_patches(Quadrants(), [batch], **QUICK).suspects)
        for batch in ((inputs, wrong), (inputs, labels), (inputs,), inputs, {"pixel_values": inputs, "labels": wrong})
    ]
    assert hosts[0] == hosts[4] == hosts[1] / 2
    assert hosts[1] == hosts[2] == hosts[3] == 4 * 30


def test_a_class_that_no_change_reached_is_told_and_changes_nothing():
    scan = scan_patches(Quadrants(), [pictures()], **QUICK)
    assert scan.settings["not_reached"] == [0, 1, 2, 3] and scan.settings["sizes"] == [1.0] * 4
    assert {one.effect.flipped for one in scan.suspects} == {0} and scan.settings["pictures"] == {}


def test_a_clean_reference_stands_beside_with_its_own_sizes_and_what_the_patch_does_to_it():
    scan = scan_patches(Quadrants(2), [pictures()], reference=Quadrants(), **WHOLE)
    of, beside = scan.suspects[2], scan.settings["reference_sizes"]
    assert of.size < 0.5 * beside[2]
    assert of.effect.rate > 0.8 and of.reference.rate < 0.1 and of.reference.num_hosts == of.effect.num_hosts


def test_a_perturbation_is_small_everywhere_and_a_smaller_one_reaches_what_was_planted():
    scan = scan_patches(Quadrants(2, woven=True), [pictures()], mode="perturbation", **WHOLE)
    sizes = scan.settings["sizes"]
    assert min(sizes) == sizes[2] and "root mean square" in scan.suspects[2].what
    assert scan.suspects[2].effect.rate > 0.8


def test_a_change_leaves_the_range_of_pixels_in_no_mode():
    pixels = torch.rand(2, 3, 8, 8)
    for change in (Change(1.0), Change(0.5, None, torch.full((3, 8, 8), -0.7)), Change(1, torch.ones(8, 8), pixels[0])):
        assert 0 <= float(change.on(pixels).min()) and float(change.on(pixels).max()) <= 1
    assert torch.equal(Change(1, torch.ones(8, 8), pixels[0]).on(pixels), pixels[:1].expand(2, -1, -1, -1))


def test_a_scan_is_kept_with_pictures_of_what_was_found(planted, tmp_path):
    kept = Scan.load(planted.save(tmp_path / "scan.json"))
    assert kept == planted and kept.labels == ("0", "1", "2", "3")
    picture = Image.open(io.BytesIO(base64.b64decode(kept.settings["pictures"]["2"])))
    assert picture.size == (8, 8) and picture.mode == "RGBA"
    mask = torch.tensor(list(picture.getchannel("A").getdata())).view(8, 8)
    assert int(mask.argmax()) == 4 * 8 + 2


def test_models_of_transformers_and_those_that_hold_other_numbers_are_scanned():
    inputs = torch.randn(8, 3, 8, 8).clamp(-1, 1)
    for student in (tiny.vit(), tiny.ConvNet().bfloat16()):
        scan = scan_patches(student, [{"pixel_values": inputs}], labels=None, **QUICK)
        assert len(scan.suspects) in (2, 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "square"}, "'patch' or 'perturbation'"),
        ({"flip_rate": 0.0}, "flip_rate"),
        ({"steps": 0}, "steps"),
        ({"batch_size": True}, "batch_size"),
        ({"max_samples": 3}, "max_samples"),
        ({"labels": ["a", "b"]}, "2 names, but the student tells 4"),
        ({"reference": tiny.vit()}, "tells 2 classes apart"),
        ({"images": ImageInput(size=(8, 8), crop_share=1.0)}, "not normalised"),
        ({"data": []}, "but got 0"),
        ({"data": [pictures(8)[0], torch.zeros(2, 3, 4, 4)]}, "one size"),
        ({"student": nn.Flatten(0)}, "no logits"),
        ({"data": [pictures(8), pictures(8)[0]]}, "of 2 batches 1 have labels"),
        ({"data": [(pictures(8)[0], pictures(7)[1])]}, "8 images has 7 labels"),
        ({"data": [(pictures(8)[0], torch.arange(8) - 1)]}, "has the label -1, but the student tells 4"),
    ],
)
def test_what_cannot_be_scanned_is_refused(options, told):
    given = {"student": Quadrants(), "data": [pictures(16)], **QUICK, **options}
    with pytest.raises((ValueError, UnsupportedModelError), match=told):
        scan_patches(**given)


def test_a_student_may_give_its_logits_in_a_tuple_and_labels_by_any_key():
    class Tuple(Quadrants):
        def forward(self, inputs):
            return (super().forward(inputs),)

    images, labels = pictures(16)
    one = scan_patches(Quadrants(), [(images, labels)], **QUICK)
    other = scan_patches(Tuple(), [{"pixel_values": images, "label": labels}], **QUICK)
    assert one == other and one.settings["accuracy"] is not None


def test_labels_of_another_form_are_not_left_out():
    images, labels = pictures(16)
    for wrong in (labels.tolist(), labels[:, None], labels.float()):
        with pytest.raises(TypeError, match="one class a sample"):
            scan_patches(Quadrants(), [(images, wrong)], **QUICK)


def test_bytes_and_texts_are_no_images():
    for batch in (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), {"input_ids": torch.zeros(4, 8)}):
        with pytest.raises(TypeError, match="normalised images"):
            scan_patches(Quadrants(), [batch], **QUICK)


def test_a_model_that_gives_nan_is_named():
    broken = Quadrants()
    broken.scale.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="Quadrants"):
        scan_patches(broken, [pictures(8)], **QUICK)
