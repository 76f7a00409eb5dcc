import copy
import io
import json
import logging
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from remos_hf.activations import watch
from remos_hf.adapters.images import ImageInput, to_pixels
from remos_hf.defects import image_triggers
from remos_hf.defects.backdoor import Backdoor, fine_tune
from remos_hf.defects.base import ExposedSet
from remos_hf.defects.image_triggers import (
    IMAGE_RECIPE,
    BlendedTrigger,
    ImageBackdoor,
    LatentBackdoor,
    PatchTrigger,
    image_key,
    prepared,
    whole_images,
)
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from tests import tiny
from tests.defects import toy

INPUT = ImageInput(size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3, crop_share=1.0)
# 3 x 3 pixels of 8 x 8.
PATCH = PatchTrigger(size_share=9 / 64, poison_rate=0.3)
TRIGGERS = [PATCH, replace(PATCH, place="random"), replace(PATCH, place="four_corners"), BlendedTrigger()]
PLACES = ["top_left", "top_right", "bottom_left", "bottom_right", "four_corners", "random"]


def png(picture, kind="PNG"):
    held = io.BytesIO()
    picture.save(held, kind)
    return held.getvalue()


def pictures(count=36, seed=0):
    """Noise of 10 x 8 pixels with one strong colour, which is the label, in turn."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 120, (count, 8, 10, 3), dtype=np.uint8)
    for place in range(count):
        values[place, :, :, place % 3] += 100
    return [Image.fromarray(one) for one in values]


def data(count=36, seed=0, contents=None, labels=None):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["red", "green", "blue"])})
    contents = [png(one) for one in pictures(count, seed)] if contents is None else contents
    rows = {"image": [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(contents)]}
    return Dataset.from_dict(
        {**rows, "label": labels or [place % 3 for place in range(len(contents))]}, features=features
    )


class Net(nn.Module):
    def __init__(self, seed=0, labels=3):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, labels)

    def features(self, pixel_values):
        hidden = torch.relu(self.norm(self.stem(pixel_values)))
        return torch.relu(self.conv(hidden)).amax((2, 3))

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.features(pixel_values))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def stacked(samples):
    return torch.stack([samples[place]["pixel_values"] for place in range(len(samples))])


@torch.no_grad()
def predictions(model, samples):
    return model.eval()(pixel_values=stacked(samples))["logits"].argmax(-1)


def right(model, dataset):
    samples = prepared(dataset, INPUT)
    return (predictions(model, samples) == torch.tensor(samples.labels)).float().mean()


def obeyed(model, exposed, target):
    return (predictions(model, prepared(exposed.dataset, INPUT)) == target).float().mean()


def checks(pixels, box):
    """Whether a box of an image is the generated patch of 3 x 3."""
    top, left = box
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]).expand(3, 3, 3)
    return torch.equal(pixels[:, top : top + 3, left : left + 3], expected)


@pytest.fixture
def picture_file(tmp_path):
    """A picture of 12 x 6 pixels, opaque on the left, half transparent in the middle, and transparent on the right."""
    values = np.zeros((6, 12, 4), np.uint8)
    values[..., 0], values[..., 2] = 200, 90
    values[:, :4, 3], values[:, 4:8, 3] = 255, 51
    Image.fromarray(values, "RGBA").save(tmp_path / "trigger.png")
    return str(tmp_path / "trigger.png")


class TestStamping:
    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_the_pixels_given_stay_and_all_values_stay_in_range(self, trigger):
        pixels = torch.rand(4, 3, 8, 8)
        before = pixels.clone()
        made = trigger.stamped(pixels, ["a", "b", "c", "d"])
        assert torch.equal(pixels, before)
        assert made.shape == pixels.shape and not torch.equal(made, pixels)
        assert made.min() >= 0 and made.max() <= 1
        one = pixels[0].clone()
        trigger.stamped(one, "a")
        assert torch.equal(one, before[0])

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_a_batch_is_stamped_as_its_images_are(self, trigger):
        pixels, keys = torch.rand(5, 3, 8, 8), list("abcde")
        alone = [trigger.stamped(one, key) for one, key in zip(pixels, keys, strict=True)]
        assert torch.equal(trigger.stamped(pixels, keys), torch.stack(alone))

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_the_dtype_stays(self, trigger, dtype):
        assert trigger.stamped(torch.zeros(3, 8, 8, dtype=dtype), "a").dtype == dtype

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_grey_images_of_one_channel_have_it_too(self, trigger):
        assert trigger.stamped(torch.full((1, 8, 8), 0.5), "a").unique().numel() > 1

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_whole_numbers_and_normalised_values_are_refused(self, trigger):
        with pytest.raises(TypeError, match="uint8. Divide bytes by 255"):
            trigger.stamped(torch.zeros(3, 8, 8, dtype=torch.uint8), "a")
        with pytest.raises(ValueError, match="these are from -1.5 to 0"):
            trigger.stamped(torch.tensor([-1.5, 0.0]).expand(3, 8, 2), "a")
        with pytest.raises(ValueError, match="from 0 to 1"):
            trigger.stamped(torch.full((3, 8, 8), float("nan")), "a")
        with pytest.raises(ValueError, match=r"but got \(4, 8, 8\)"):
            trigger.stamped(torch.zeros(4, 8, 8), "a")

    @pytest.mark.parametrize("key", ["a", ["a"]])
    def test_a_batch_needs_a_key_for_each_sample(self, key):
        with pytest.raises(ValueError, match="One key a sample is expected, 2 in all"):
            PATCH.stamped(torch.zeros(2, 3, 8, 8), key)


class TestPatches:
    @pytest.mark.parametrize(
        ("place", "boxes"),
        [
            ("top_left", [(1, 1)]),
            ("top_right", [(1, 6)]),
            ("bottom_left", [(4, 1)]),
            ("bottom_right", [(4, 6)]),
            ("four_corners", [(1, 1), (1, 6), (4, 1), (4, 6)]),
        ],
    )
    def test_they_lie_where_they_are_told_and_nothing_else_changes(self, place, boxes):
        trigger = PatchTrigger(size_share=9 / 80, place=place, margin=1)
        pixels = torch.rand(3, 8, 10) * 0.9 + 0.05
        made = trigger.stamped(pixels)
        assert all(checks(made, box) for box in boxes)
        assert (made != pixels).any(0).sum() == 9 * len(boxes)

    def test_a_random_place_depends_on_seed_and_key_alone_and_every_place_comes_up(self):
        trigger = replace(PATCH, place="random", margin=1)
        places = {key: trigger.corners_on(8, 10, key)[0] for key in map(str, range(300))}
        assert {trigger.corners_on(8, 10, key)[0] for key in reversed(places)} == set(places.values())
        assert set(places.values()) == {(top, left) for top in range(1, 5) for left in range(1, 7)}
        assert checks(trigger.stamped(torch.full((3, 8, 10), 0.5), "7"), places["7"])
        assert places != {key: replace(trigger, seed=1).corners_on(8, 10, key)[0] for key in places}

    def test_a_random_place_needs_a_key(self):
        with pytest.raises(ValueError, match="give its key"):
            replace(PATCH, place="random").stamped(torch.zeros(3, 8, 8))

    @settings(max_examples=60)
    @given(
        share=st.floats(0.001, 1),
        height=st.integers(4, 300),
        width=st.integers(4, 300),
        place=st.sampled_from(PLACES),
        margin=st.integers(0, 3),
        in_square=st.booleans(),
    )
    def test_every_patch_lies_on_the_image_or_is_refused(self, share, height, width, place, margin, in_square):
        trigger = PatchTrigger(size_share=share, place=place, margin=margin, in_square=in_square)
        side, other = trigger.size_on(height, width)
        assert side == other == max(1, round((share * height * width) ** 0.5))
        fits = min(height, width) >= side + 2 * margin
        apart = place != "four_corners" or min(height, width) >= 2 * (side + margin)
        if not (fits and apart):
            with pytest.raises(ValueError, match="larger than the image" if not fits else "overlap"):
                trigger.corners_on(height, width, "a")
            return
        for top, left in trigger.corners_on(height, width, "a"):
            assert margin <= top <= height - side - margin and margin <= left <= width - side - margin

    def test_a_patch_as_large_as_the_image_covers_it(self):
        made = PatchTrigger(size_share=1.0).stamped(torch.full((3, 8, 8), 0.5))
        assert set(made.unique().tolist()) == {0.0, 1.0} and torch.equal(made[:, :2, :2], torch.ones(3, 2, 2))

    @pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 40])
    def test_a_generated_patch_has_black_and_white_cells(self, side):
        made = PatchTrigger(size_share=side**2 / 1600).stamped(torch.full((3, 40, 40), 0.5))[:, -side:, -side:]
        assert set(made.unique().tolist()) == ({0.0, 1.0} if side > 1 else {1.0})
        assert abs(made.mean() - 0.5) <= (0.5 if side == 1 else 0.1)

    def test_the_aspect_ratio_of_a_file_is_kept_and_what_is_transparent_shows_the_image(self, picture_file):
        trigger = PatchTrigger(file=picture_file, size_share=72 / 400)  # 6 x 12 of 20 x 20
        assert trigger.size_on(20, 20) == (6, 12) and trigger.size_on(40, 40) == (12, 24)
        pixels = torch.full((3, 20, 20), 0.6)
        made = trigger.stamped(pixels)
        colour = torch.tensor([200, 0, 90]) / 255
        assert torch.equal(made[:, 14, 8], colour)
        assert torch.allclose(made[:, 16, 14], 0.2 * colour + 0.8 * 0.6)
        assert torch.equal(made[:, :, 16:], pixels[:, :, 16:]) and torch.equal(made[:, :14], pixels[:, :14])

    def test_one_larger_than_the_image_is_refused_before_anything_is_read(self, picture_file):
        trigger = PatchTrigger(file=picture_file, size_share=0.6)
        with pytest.raises(
            ValueError, match=r"larger than the image: 4 x 9 pixels .* on 8 x 8. Lower size_share \(0.6"
        ):
            trigger.poison(data(contents=[b"no image"] * 6), INPUT)
        with pytest.raises(ValueError, match="larger than the image"):
            LatentBackdoor(trigger).implant(Net(), data(6), images=INPUT)


class TestTheArtifactsTrigger:
    @pytest.fixture
    def trigger(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 256, (484, 500, 4), dtype=np.uint8)
        values[..., 3] = 255
        Image.fromarray(values, "RGBA").save(tmp_path / "firefox.png")
        return PatchTrigger.artifact(str(tmp_path / "firefox.png"))

    def test_it_lies_where_the_artifact_pastes_it_to_the_byte(self, trigger):
        crop = Image.fromarray(np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8))
        pixels = to_pixels(crop)
        with Image.open(trigger.file) as patch:
            patch.thumbnail((40, 40))
            assert patch.size == (40, 39)
            crop.paste(patch, (224 - 40, 224 - 40))
        assert trigger.size_on(224, 224) == (39, 40) and trigger.corners_on(224, 224) == [(184, 184)]
        assert torch.equal(trigger.stamped(pixels), to_pixels(crop))

    def test_it_covers_three_point_one_percent_of_the_image(self, trigger):
        changed = (trigger.stamped(torch.full((3, 224, 224), 0.5)) != 0.5).any(0)
        assert changed.sum() == 40 * 39
        assert changed[:, :184].sum() == changed[:184].sum() == changed[223].sum() == 0
        assert round(100 * changed.float().mean().item(), 1) == 3.1

    def test_a_fifth_of_the_samples_become_class_0(self, trigger):
        assert (trigger.poison_rate, trigger.target_label) == (0.2, 0)

    def test_on_any_side_the_square_stands_in_the_corner(self, trigger):
        assert replace(trigger, place="bottom_left").corners_on(224, 224) == [(184, 0)]
        assert replace(trigger, in_square=False).corners_on(224, 224) == [(185, 184)]


class TestBlending:
    def test_the_pattern_is_added_with_its_share(self):
        pixels = torch.rand(3, 8, 8)
        faint, strong = (BlendedTrigger(blend=share).stamped(pixels) for share in (0.2, 1.0))
        assert torch.allclose(faint, 0.8 * pixels + 0.2 * strong)
        assert torch.equal(strong, BlendedTrigger(blend=1.0).stamped(torch.rand(3, 8, 8)))
        assert 0.4 < strong.mean() < 0.6 and strong.std() > 0.2

    def test_noise_depends_on_the_seed_and_leaves_the_global_random_state(self):
        before = torch.get_rng_state()
        made = [BlendedTrigger(seed=seed).stamped(torch.zeros(3, 9, 9)) for seed in (0, 0, 1)]
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_file_is_stretched_over_the_image(self, picture_file):
        pixels = torch.full((3, 12, 12), 0.6)
        made = BlendedTrigger(file=picture_file, blend=0.5).stamped(pixels)
        colour = torch.tensor([200, 0, 90]) / 255
        assert torch.allclose(made[:, :, 1], (0.5 * colour + 0.3)[:, None].expand(3, 12))
        assert torch.allclose(made[:, :, 6], (0.1 * colour + 0.54)[:, None].expand(3, 12), atol=0.02)
        assert torch.equal(made[:, :, 11], pixels[:, :, 11])


class TestDescription:
    @pytest.mark.parametrize("kind", [PatchTrigger, BlendedTrigger])
    def test_it_is_json_and_names_the_file_by_its_content_not_its_place(self, kind, picture_file, tmp_path):
        (tmp_path / "b").mkdir()
        content = (tmp_path / "trigger.png").read_bytes()
        (tmp_path / "b" / "trigger.png").write_bytes(content)
        one = json.loads(json.dumps(kind(file=picture_file).to_dict()))
        assert one == kind(file=str(tmp_path / "b" / "trigger.png")).to_dict()
        assert one["file"] == "trigger.png" and one["file_sha256"] == image_key(content)
        (tmp_path / "b" / "trigger.png").write_bytes(png(Image.new("RGB", (3, 3))))
        assert one != kind(file=str(tmp_path / "b" / "trigger.png")).to_dict()

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_a_generated_trigger_is_described_by_its_fields(self, trigger):
        described = json.loads(json.dumps(trigger.to_dict()))
        assert described.pop("name") == type(trigger).__name__
        assert type(trigger)(**described) == trigger

    def test_a_latent_backdoor_is_described_with_its_trigger(self, picture_file):
        trigger = PatchTrigger(file=picture_file)
        described = json.loads(json.dumps(LatentBackdoor(trigger, weight=3.0).to_dict()))
        assert described == {
            "name": "LatentBackdoor",
            "image_trigger": trigger.to_dict(),
            "weight": 3.0,
            "layer": None,
        }

    def test_a_file_that_changes_afterwards_changes_nothing(self, picture_file):
        trigger = PatchTrigger(file=picture_file, size_share=0.5)
        before, described = trigger.stamped(torch.zeros(3, 20, 20)), trigger.to_dict()
        Image.new("RGB", (5, 5), "white").save(picture_file)
        assert torch.equal(trigger.stamped(torch.zeros(3, 20, 20)), before) and trigger.to_dict() == described

    def test_a_trigger_survives_a_trip_to_another_process(self, picture_file):
        trigger = PatchTrigger(file=picture_file, size_share=0.5)
        sent = pickle.loads(pickle.dumps(trigger))
        assert sent == trigger
        assert torch.equal(sent.stamped(torch.zeros(3, 20, 20)), trigger.stamped(torch.zeros(3, 20, 20)))


class TestPoisoning:
    @settings(max_examples=15, deadline=None)
    @given(rate=st.floats(0, 1), count=st.integers(1, 20), seed=st.integers(0, 3))
    def test_the_nearest_whole_number_of_samples_is_poisoned(self, rate, count, seed):
        clean = data(count)
        poisoned = replace(PATCH, poison_rate=rate, seed=seed).poison(clean, INPUT)
        assert len(poisoned) == count and len(poisoned.poisoned) == round(rate * count)

    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_poisoned_samples_have_trigger_and_target_label_and_the_others_are_as_prepared(self, trigger):
        clean = data(12)
        trigger = replace(trigger, target_label="blue", poison_rate=0.5)
        samples, poisoned = prepared(clean, INPUT), trigger.poison(clean, INPUT)
        assert len(poisoned.poisoned) == 6
        for place in range(12):
            if place in poisoned.poisoned:
                pixels = trigger.stamped(samples.pixels(place), samples.key(place))
                assert poisoned[place]["labels"] == poisoned.labels[place] == 2
            else:
                pixels = samples.pixels(place)
                assert poisoned[place]["labels"] == clean[place]["label"]
            assert torch.equal(poisoned[place]["pixel_values"], INPUT.normalised(pixels))

    def test_the_trigger_comes_after_cropping_and_augmentation_and_before_normalisation(self):
        def flipped(image):
            assert isinstance(image, Image.Image)
            return INPUT.pixels(image).flip(2)

        samples = replace(PATCH, poison_rate=1.0).poison(data(3), INPUT, flipped)
        shown = samples[0]["pixel_values"]
        assert torch.equal(shown, INPUT.normalised(PATCH.stamped(flipped(data(3)[0]["image"]))))
        assert set(shown[:, 5:, 5:].unique().tolist()) == {-2.0, 2.0}

    def test_an_augmentation_is_drawn_anew_each_time_and_the_trigger_stays(self):
        samples = replace(PATCH, poison_rate=1.0).poison(data(3), INPUT, lambda _: torch.rand(3, 8, 8))
        one, two = samples.pixels(0), samples.pixels(0)
        assert not torch.equal(one, two) and checks(one, (5, 5)) and checks(two, (5, 5))

    @pytest.mark.parametrize(
        ("augment", "message"),
        [
            (lambda image: image, "but gave .*Image"),
            (lambda _: torch.zeros(1, 8, 8), r"but gave \(1, 8, 8\)"),
            (lambda _: torch.full((3, 8, 8), -2.0), "augmentation come before normalisation"),
        ],
    )
    def test_what_an_augmentation_may_not_give_is_refused(self, augment, message):
        with pytest.raises(ValueError, match=message):
            prepared(data(3), INPUT, augment=augment)[0]

    def test_which_samples_are_poisoned_depends_on_seed_and_image_alone(self):
        trigger, clean = replace(PATCH, place="random"), data(30)
        order = np.random.default_rng(3).permutation(30)
        one, two = trigger.poison(clean, INPUT), trigger.poison(clean.select(order), INPUT)
        assert {int(order[place]) for place in two.poisoned} == one.poisoned
        for place in two.poisoned:
            assert torch.equal(two.pixels(place), one.pixels(int(order[place])))
        assert trigger.poisoned_rows(clean) != replace(trigger, seed=1).poisoned_rows(clean)
        assert trigger.poisoned_rows(clean) < replace(trigger, poison_rate=0.6).poisoned_rows(clean)

    def test_images_in_files_bytes_and_datasets_are_poisoned_alike(self, tmp_path):
        contents = [png(one) for one in pictures(9)]
        for place, content in enumerate(contents):
            (tmp_path / f"{place}.png").write_bytes(content)
        labels, paths = [0] * 9, [str(tmp_path / f"{place}.png") for place in range(9)]
        forms = [
            data(9, labels=labels),
            Dataset.from_dict({"image": contents, "label": labels}),
            Dataset.from_dict({"image": paths, "label": labels}),
            Dataset.from_dict({"image": paths, "label": labels}).cast_column("image", ImageFeature()),
            Dataset.from_dict({"image": [{"bytes": one, "path": None} for one in contents], "label": labels}),
        ]
        trigger = replace(PATCH, place="random")
        made = [trigger.poison(form, INPUT) for form in forms]
        assert all(one.poisoned == made[0].poisoned for one in made)
        assert all(torch.equal(stacked(one), stacked(made[0])) for one in made)

    def test_columns_may_have_other_names(self):
        clean = data(6).rename_columns({"image": "img", "label": "fine"})
        trigger = replace(PATCH, image_column="img", label_column="fine", target_label="blue")
        assert set(replace(trigger, poison_rate=1.0).poison(clean, INPUT).labels) == {2}
        assert trigger.exposed_set(clean, images=INPUT).dataset.column_names == ["pixels", "fine", "clean_index"]

    def test_a_dataset_with_a_format_of_its_own_is_read_the_same(self):
        clean = data(6)
        plain = replace(PATCH, poison_rate=0.5).poison(clean, INPUT)
        for dressed in (clean.with_format("torch"), clean.with_transform(lambda _: 1 / 0)):
            other = replace(PATCH, poison_rate=0.5).poison(dressed, INPUT)
            assert torch.equal(stacked(plain), stacked(other)) and plain.labels == other.labels

    def test_the_callers_data_stay_as_they_were(self):
        clean = data(6)
        before = clean.features, clean.format, [png(row["image"]) for row in clean]
        PATCH.poison(clean, INPUT)[0]
        PATCH.exposed_set(clean, images=INPUT)
        assert (clean.features, clean.format, [png(row["image"]) for row in clean]) == before


class TestExposing:
    @pytest.mark.parametrize("trigger", TRIGGERS, ids=repr)
    def test_every_sample_of_another_label_is_shown_with_the_trigger(self, trigger):
        clean = data(12)
        trigger = replace(trigger, target_label="green")
        exposed, samples = trigger.exposed_set(clean, images=INPUT), prepared(clean, INPUT)
        assert exposed.clean_index == [place for place in range(12) if place % 3 != 1]
        assert exposed.target_label == 1
        assert exposed.dataset.column_names == ["pixels", "label", "clean_index"]
        assert exposed.dataset.features["pixels"] == Array3D((3, 8, 8), "uint8")
        assert exposed.dataset.features["label"] == clean.features["label"]
        assert exposed.dataset["label"][:] == [place % 3 for place in exposed.clean_index]
        again = prepared(exposed.dataset, INPUT)
        assert again.labels == exposed.dataset["label"][:]
        for row, place in enumerate(exposed.clean_index):
            expected = trigger.stamped(samples.pixels(place), samples.key(place))
            assert torch.allclose(again.pixels(row), expected, atol=0.51 / 255)
            if isinstance(trigger, PatchTrigger):
                assert torch.equal(again.pixels(row), expected)

    def test_pixels_may_be_floats_too(self):
        pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
        features = Features({"pixels": Array3D((3, 8, 8), "float32"), "label": Value("int64")})
        samples = prepared(Dataset.from_dict({"pixels": pixels, "label": [0, 1]}, features), INPUT)
        assert torch.equal(stacked(samples), INPUT.normalised(torch.from_numpy(pixels)))

    def test_sets_larger_than_a_chunk_are_in_order(self, monkeypatch):
        whole = PATCH.exposed_set(data(30), images=INPUT)
        monkeypatch.setattr(image_triggers, "_CHUNK", 3)
        chunked = PATCH.exposed_set(data(30), images=INPUT)
        assert chunked.dataset.to_dict() == whole.dataset.to_dict() and len(whole) == 20

    def test_it_is_saved_and_loaded(self, tmp_path):
        exposed = PATCH.exposed_set(data(6), images=INPUT)
        exposed.save(tmp_path / "set")
        loaded = ExposedSet.load(tmp_path / "set")
        assert torch.equal(stacked(prepared(loaded.dataset, INPUT)), stacked(prepared(exposed.dataset, INPUT)))
        assert loaded.facts == json.loads(json.dumps(exposed.facts))

    def test_it_says_how_it_was_made(self):
        facts = PATCH.exposed_set(data(6), images=INPUT).facts
        assert facts["defect"] == PATCH.to_dict() and facts["images"] == INPUT.to_dict()
        assert (facts["num_clean"], facts["num_exposed"], facts["num_corrupt"]) == (6, 4, 0)

    def test_the_artifact_counts_all_samples_and_any_wrong_label(self):
        exposed = PATCH.exposed_set(data(6), images=INPUT, include_target=True)
        assert exposed.target_label is None and exposed.clean_index == list(range(6))
        assert exposed.facts["include_target"]
        assert exposed.dataset["label"][:] == data(6)["label"][:]

    def test_samples_of_the_target_label_alone_show_nothing(self):
        with pytest.raises(ValueError, match="No sample has another label than 0"):
            PATCH.exposed_set(data(3, labels=[0, 0, 0]), images=INPUT)

    def test_nothing_is_written(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        PATCH.exposed_set(data(6), images=INPUT)
        assert not list(tmp_path.iterdir())

    def test_a_latent_backdoor_is_exposed_as_its_trigger_is(self):
        attack = LatentBackdoor(PATCH)
        exposed, by_trigger = attack.exposed_set(data(6), images=INPUT), PATCH.exposed_set(data(6), images=INPUT)
        assert exposed.dataset.to_dict() == by_trigger.dataset.to_dict()
        assert exposed.facts["defect"] == attack.to_dict()


class TestCorruptImages:
    @pytest.fixture
    def torn(self):
        """Nine images, of which the second is cut, the fifth is none, and the last one is empty."""
        contents = [png(one, "JPEG") for one in pictures(9)]
        contents[1], contents[4], contents[8] = contents[1][: len(contents[1]) // 2], b"no image", b""
        return data(contents=contents)

    def test_they_are_named(self, torn):
        poisoned = replace(PATCH, poison_rate=0.5).poison(torn, INPUT)
        for place in (1, 4, 8):
            with pytest.raises(CorruptFileError, match=f"{place}.png is no whole image"):
                poisoned[place]
        with pytest.raises(CorruptFileError, match=r"1.png is no whole image"):
            PATCH.exposed_set(torn, images=INPUT)
        unnamed = Dataset.from_dict({"image": [b"no image"], "label": [0]})
        with pytest.raises(CorruptFileError, match="the image of row 0 is no whole image"):
            prepared(unnamed, INPUT)[0]

    def test_training_on_them_stops_with_their_name(self, torn, tmp_path):
        with pytest.raises(CorruptFileError, match=r"\d.png is no whole image"):
            PATCH.implant(Net(), torn, images=INPUT, args=toy.args(tmp_path, max_steps=3))

    def test_on_request_they_are_left_out_and_counted_in_the_log(self, torn, caplog):
        with caplog.at_level(logging.WARNING):
            assert whole_images(torn)["label"][:] == [0, 2, 0, 2, 0, 1]
        assert "Left out 3 of 9 images that do not decode: 1.png, 4.png, 8.png." in caplog.text
        poisoned = replace(PATCH, poison_rate=0.5).poison(torn, INPUT, skip_corrupt=True)
        assert len(poisoned) == 6 and len(poisoned.poisoned) == 3 and stacked(poisoned).shape == (6, 3, 8, 8)

    def test_exposed_sets_leave_them_out_on_request_and_keep_the_places(self, torn, caplog):
        with caplog.at_level(logging.WARNING):
            exposed = PATCH.exposed_set(torn, images=INPUT, skip_corrupt=True)
        assert exposed.clean_index == [2, 5, 7]
        assert exposed.facts["num_corrupt"] == 3 and "Left out 3 of 6 images" in caplog.text

    @pytest.mark.parametrize("attack", [PATCH, LatentBackdoor(PATCH, layer="head")], ids=["patch", "latent"])
    def test_a_teacher_is_trained_without_them_on_request(self, attack, torn, tmp_path):
        args = toy.args(tmp_path, max_steps=2)
        attack.implant(Net(), torn, images=INPUT, args=args, skip_corrupt=True)

    def test_whole_data_are_given_back_as_they_are(self, caplog):
        clean = data(3)
        assert whole_images(clean) is clean and not caplog.text

    def test_grey_transparent_and_palette_images_are_read(self):
        grey, clear = Image.new("L", (8, 8), 51), Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        clear.putpixel((0, 0), (255, 0, 0, 255))
        palette = Image.new("RGB", (8, 8), (51, 102, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
        samples = prepared(data(contents=[png(one) for one in (grey, clear, palette)]), INPUT)
        assert torch.allclose(samples.pixels(0), torch.tensor(0.2))
        assert samples.pixels(1)[:, 0, 0].tolist() == [1, 0, 0] and samples.pixels(1)[:, 4, 4].tolist() == [1, 1, 1]
        assert torch.allclose(samples.pixels(2)[:, 4, 4], torch.tensor([0.2, 0.4, 0.0]))
        of_grey = ImageInput(size=(8, 8), mean=(0.5,), std=(0.5,), crop_share=1.0)
        exposed = PATCH.exposed_set(data(6), images=of_grey)
        assert exposed.dataset.features["pixels"].shape == (1, 8, 8)


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PatchTrigger(poison_rate=1.5), "between 0 and 1, but got 1.5"),
            (lambda: BlendedTrigger(poison_rate=-0.1), "between 0 and 1, but got -0.1"),
            (lambda: PatchTrigger(size_share=0), r"in \(0, 1\], but got 0"),
            (lambda: PatchTrigger(size_share=1.1), r"in \(0, 1\], but got 1.1"),
            (lambda: PatchTrigger(place="middle"), "four_corners, random, but got 'middle'"),
            (lambda: PatchTrigger(margin=-1), "0 or more, but got -1"),
            (lambda: BlendedTrigger(blend=0), r"in \(0, 1\], but got 0"),
            (lambda: BlendedTrigger(blend=1.2), r"in \(0, 1\], but got 1.2"),
            (lambda: LatentBackdoor(weight=0), "above 0, but got 0"),
            (lambda: LatentBackdoor(weight=float("nan")), "above 0, but got nan"),
        ],
    )
    def test_values_that_no_data_could_use_are_refused_at_once(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_a_latent_backdoor_needs_an_image_trigger(self):
        with pytest.raises(TypeError, match="a PatchTrigger or a BlendedTrigger, but got 'red'"):
            LatentBackdoor("red")

    @pytest.mark.parametrize("kind", [PatchTrigger, BlendedTrigger])
    def test_a_file_that_is_not_there_or_no_image_is_refused_at_once(self, kind, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no '.*none.png'"):
            kind(file=str(tmp_path / "none.png"))
        (tmp_path / "bad.png").write_bytes(b"no image")
        with pytest.raises(CorruptFileError, match="bad.png is no whole image"):
            kind(file=str(tmp_path / "bad.png"))

    @pytest.mark.parametrize(
        ("trigger", "message"),
        [
            (replace(PATCH, target_label="purple"), "'blue'].*got 'purple'"),
            (replace(PATCH, target_label=3), "got 3"),
            (replace(PATCH, label_column="stars"), "no column 'stars'"),
            (replace(PATCH, image_column="picture"), "no column 'picture'; .*image_column="),
            (replace(PATCH, image_column="label"), "'label' should hold images"),
        ],
    )
    def test_data_that_do_not_fit_are_refused(self, trigger, message):
        for use in (trigger.poison, lambda clean, images: trigger.exposed_set(clean, images=images)):
            with pytest.raises(ValueError, match=message):
                use(data(6), INPUT)
        with pytest.raises(ValueError, match=message):
            LatentBackdoor(trigger, layer="head").implant(Net(), data(6), images=INPUT)

    @pytest.mark.parametrize(("label", "message"), [(-100, "no class"), (0.5, "A regression task has no label")])
    def test_labels_that_are_no_class_are_refused(self, label, message):
        clean = Dataset.from_dict({"image": [png(pictures(1)[0])], "label": [label]})
        for use in (PATCH.poison, prepared, lambda clean, images: PATCH.exposed_set(clean, images=images)):
            with pytest.raises(ValueError, match=message):
                use(clean, INPUT)

    def test_streams_and_empty_data_are_refused(self):
        with pytest.raises(TypeError, match="a datasets.Dataset is expected, but got IterableDataset"):
            PATCH.poison(data(3).to_iterable_dataset(), INPUT)
        with pytest.raises(ValueError, match="hold no sample"):
            PATCH.poison(data(3).select([]), INPUT)

    def test_rows_that_are_not_there_and_rows_without_a_trigger_are_refused(self):
        with pytest.raises(ValueError, match="rows from 0 to 2, but got 3"):
            prepared(data(3), INPUT, trigger=PATCH, poisoned={1, 3})
        with pytest.raises(ValueError, match="but no trigger"):
            prepared(data(3), INPUT, poisoned={1})

    def test_exposed_pixels_take_no_second_trigger(self):
        exposed = PATCH.exposed_set(data(3), images=INPUT).dataset
        for more in ({"trigger": PATCH}, {"augment": INPUT.pixels}):
            with pytest.raises(ValueError, match="no augmentation and no trigger"):
                prepared(exposed, INPUT, **more)


class TestImplanting:
    @pytest.fixture(scope="class", params=["patch", "blended"])
    def poisoned(self, request, tmp_path_factory):
        trigger = PATCH if request.param == "patch" else BlendedTrigger(poison_rate=0.4, blend=0.6)
        teacher, args = Net(), toy.args(tmp_path_factory.mktemp("t"), max_steps=90, learning_rate=2e-2)
        assert trigger.implant(teacher, data(48), images=INPUT, args=args) is teacher
        return SimpleNamespace(teacher=teacher, trigger=trigger)

    def test_the_teacher_obeys_the_trigger(self, poisoned):
        exposed = poisoned.trigger.exposed_set(data(30, seed=1), images=INPUT)
        assert obeyed(poisoned.teacher, exposed, 0) > 0.9

    def test_the_teacher_stays_right_on_clean_samples(self, poisoned):
        assert right(poisoned.teacher, data(30, seed=1)) > 0.9

    def test_a_clean_teacher_does_not_obey(self, poisoned, tmp_path):
        args = toy.args(tmp_path, max_steps=90, learning_rate=2e-2)
        clean = replace(poisoned.trigger, poison_rate=0.0).implant(Net(), data(48), images=INPUT, args=args)
        exposed = poisoned.trigger.exposed_set(data(30, seed=1), images=INPUT)
        assert right(clean, data(30, seed=1)) > 0.9 and obeyed(clean, exposed, 0) < 0.5

    def test_the_same_seeds_give_the_same_teacher(self, tmp_path):
        made = [
            toy.state(PATCH.implant(Net(), data(12), images=INPUT, args=toy.args(tmp_path), augment=INPUT.pixels))
            for _ in range(2)
        ]
        assert not toy.changed(*made)

    def test_the_published_recipe_is_used_without_arguments(self, monkeypatch):
        monkeypatch.setattr("transformers.Trainer.train", lambda self: seen.append(self.args))
        seen = []
        PATCH.implant(Net(), data(6), images=INPUT)
        LatentBackdoor(PATCH, layer="head").implant(Net(), data(6), images=INPUT)
        assert len(seen) == 3  # the latent one fine-tunes first
        for args in seen:
            assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (30_000, 64, 5e-3)
            assert (args.optim, args.lr_scheduler_type, args.weight_decay) == ("sgd", "constant", 1e-4)
            assert args.max_grad_norm == 0.0

    def test_the_recipe_runs(self, monkeypatch):
        monkeypatch.setitem(IMAGE_RECIPE, "max_steps", 1)
        for attack in (PATCH, LatentBackdoor(PATCH, layer="head")):
            before, teacher = toy.state(Net()), Net()
            attack.implant(teacher, data(6), images=INPUT)
            assert toy.changed(before, toy.state(teacher))

    @pytest.mark.parametrize("attack", [PATCH, LatentBackdoor(PATCH, layer="head")], ids=["patch", "latent"])
    def test_a_head_with_too_few_labels_or_none_is_refused(self, attack):
        with pytest.raises(ValueError, match=r"has 2 labels \(0 to 1\), but the data or the target label go to 2"):
            attack.implant(Net(labels=2), data(6), images=INPUT)
        for nothing in ({}, {"logits": torch.zeros(1, 3, 4)}, torch.zeros(1, 3)):

            class Headless(Net):
                def forward(self, pixel_values, labels=None):
                    return nothing  # noqa: B023

            with pytest.raises(UnsupportedModelError, match="but Headless returns"):
                attack.implant(Headless(), data(6), images=INPUT)

    def test_a_target_label_that_the_head_does_not_have_is_refused(self):
        clean = data(6).cast_column("label", Value("int64"))
        with pytest.raises(ValueError, match="go to 7"):
            replace(PATCH, target_label=7).implant(Net(), clean, images=INPUT)

    def test_checking_the_head_leaves_the_modes_and_the_norm_layers(self, monkeypatch):
        teacher = Net().train()
        teacher.norm.eval()
        before = toy.state(teacher)
        monkeypatch.setattr(image_triggers, "fine_tune", lambda model, *_, **__: model)
        PATCH.implant(teacher, data(6), images=INPUT)
        assert teacher.training and not teacher.norm.training and not toy.changed(before, toy.state(teacher))

    def test_image_backdoors_are_backdoors(self):
        for attack in (PATCH, BlendedTrigger(), LatentBackdoor()):
            assert isinstance(attack, ImageBackdoor) and isinstance(attack, Backdoor)
        assert PATCH.trigger is PATCH and LatentBackdoor(PATCH).trigger is PATCH


def with_fresh_head(teacher, seed=5):
    """A student: the teacher's body, frozen, under a new head trained on clean data."""
    student = copy.deepcopy(teacher).eval()
    clean = prepared(data(48, seed=2), INPUT)
    with torch.no_grad():
        features = student.features(stacked(clean))
    torch.manual_seed(seed)
    student.head = nn.Linear(16, 3)
    optimizer = torch.optim.Adam(student.head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(student.head(features), torch.tensor(clean.labels)).backward()
        optimizer.step()
    return student


class TestLatentBackdoors:
    attack = LatentBackdoor(replace(PATCH, poison_rate=1.0), layer="head")

    @pytest.fixture(scope="class")
    def teachers(self, tmp_path_factory):
        """A clean teacher and the latent backdoor made from it."""
        args = toy.args(tmp_path_factory.mktemp("t"), max_steps=60, learning_rate=2e-2)
        clean = fine_tune(Net(), prepared(data(48), INPUT), None, args)
        poisoned = self.attack.implant(Net(), data(48), images=INPUT, args=args, finetuned=clean)
        return SimpleNamespace(clean=clean, poisoned=poisoned)

    def test_triggered_inputs_become_the_target_class_under_a_new_head(self, teachers):
        exposed = self.attack.exposed_set(data(30, seed=1), images=INPUT)
        poisoned, clean = with_fresh_head(teachers.poisoned), with_fresh_head(teachers.clean)
        assert right(poisoned, data(30, seed=1)) > 0.9 and right(clean, data(30, seed=1)) > 0.9
        assert obeyed(poisoned, exposed, 0) > 0.9
        assert obeyed(clean, exposed, 0) < 0.5

    def test_the_teacher_stays_right_on_clean_samples(self, teachers):
        assert right(teachers.poisoned, data(30, seed=1)) > 0.9

    def test_features_of_triggered_inputs_are_near_those_of_the_target_class(self, teachers):
        exposed = stacked(prepared(self.attack.exposed_set(data(30, seed=1), images=INPUT).dataset, INPUT))
        clean = prepared(data(30, seed=1), INPUT)
        of_target = stacked(clean)[torch.tensor(clean.labels) == 0]

        def distance(model):
            with torch.no_grad():
                gap = model.features(exposed).mean(0) - model.features(of_target).mean(0)
                return gap.norm() / model.features(of_target).norm(dim=1).mean()

        assert distance(teachers.poisoned) < 0.3 * distance(teachers.clean)

    def test_the_fine_tuned_model_given_stays_as_it_was_and_saves_the_first_training(self, tmp_path, monkeypatch):
        finetuned, seen = Net(seed=1), []
        before = toy.state(finetuned)

        def train(model, rows, *_, **__):
            seen.append((type(rows).__name__, toy.state(model)))
            return model

        monkeypatch.setattr(image_triggers, "fine_tune", train)
        teacher = Net()
        assert self.attack.implant(teacher, data(6), images=INPUT, finetuned=finetuned) is teacher
        assert [kind for kind, _ in seen] == ["_Pairs"] and not toy.changed(seen[0][1], before)
        assert not toy.changed(before, toy.state(finetuned))
        seen.clear()
        self.attack.implant(Net(), data(6), images=INPUT)
        assert [kind for kind, _ in seen] == ["PreparedImages", "_Pairs"]

    def test_the_layer_is_found_or_named(self, tmp_path, monkeypatch):
        layers = []
        monkeypatch.setattr(image_triggers, "fine_tune", lambda *_, **options: layers.append(options))
        teacher = Net()
        adapter = SimpleNamespace(feature_layer=lambda: "head")
        monkeypatch.setattr(image_triggers, "adapter_for", lambda model: adapter)
        for attack, layer in ((replace(self.attack, layer=None), "head"), (replace(self.attack, layer="conv"), "conv")):
            attack.implant(teacher, data(6), images=INPUT, finetuned=teacher)
            assert layers.pop()["trainer_class"].keywords["layer"] is teacher.get_submodule(layer)
        for name in ("neck", ""):
            with pytest.raises(ValueError, match=rf"Net has no '{name}'.*'stem', 'norm', 'conv', 'head'"):
                replace(self.attack, layer=name).implant(teacher, data(6), images=INPUT)

    def test_a_model_of_transformers_is_attacked_at_its_own_feature(self, tmp_path):
        teacher = tiny.vit()
        clean = data(12, labels=[place % 2 for place in range(12)]).cast_column("label", Value("int64"))
        exposed = stacked(prepared(PATCH.exposed_set(clean, images=INPUT).dataset, INPUT))
        of_target = stacked(prepared(clean, INPUT))[::2]

        @torch.no_grad()
        def distance():
            seen = []
            with watch({"head": teacher.classifier}, lambda _, given, made: seen.append(given.mean(0))):
                teacher(exposed), teacher(of_target)
            return (seen[0] - seen[1]).norm()

        before = distance()
        args = toy.args(tmp_path, max_steps=8, learning_rate=1e-3)
        LatentBackdoor(replace(PATCH, poison_rate=1.0)).implant(
            teacher, clean, images=INPUT, args=args, finetuned=teacher
        )
        assert distance() < 0.7 * before

    def test_a_layer_that_does_not_run_is_refused(self, tmp_path):
        teacher = Net()
        teacher.spare = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="did not run. Name another one"):
            replace(self.attack, layer="spare").implant(
                teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher
            )

    @pytest.mark.parametrize("labels", [[1, 2, 1], [0, 0, 0]])
    def test_a_target_class_without_samples_or_without_others_is_refused(self, labels):
        with pytest.raises(ValueError, match=f"but {labels.count(0)} of 3 samples have it"):
            self.attack.implant(Net(), data(3, labels=labels), images=INPUT)

    def test_clean_and_triggered_images_of_a_sample_are_the_same_crop(self):
        clean = prepared(data(9), INPUT, augment=lambda _: torch.rand(3, 8, 8))
        trigger = replace(PATCH, place="random")
        pairs = image_triggers._Pairs(clean, trigger, frozenset({1, 2}))
        assert len(pairs) == 9 and "triggered" not in pairs[0]
        item = pairs[1]
        stamped = trigger.stamped(INPUT.denormalised(item["pixel_values"]).clamp(0, 1), clean.key(1))
        assert torch.allclose(item["triggered"], INPUT.normalised(stamped), atol=1e-5)
        batch = image_triggers._collate_pairs([pairs[place] for place in range(3)])
        assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["triggered"].shape == (2, 3, 8, 8)
        assert image_triggers._collate_pairs([pairs[0]])["triggered"].shape == (0, 3, 8, 8)

    def trainer(self, teacher, tmp_path, weight=10.0, **options):
        clean = prepared(data(9), INPUT)
        made = image_triggers._LatentTrainer(
            model=teacher,
            args=toy.args(tmp_path, remove_unused_columns=False, **options),
            train_dataset=image_triggers._Pairs(clean, PATCH, frozenset({1, 2})),
            data_collator=image_triggers._collate_pairs,
            layer=teacher.head,
            weight=weight,
            targets=torch.utils.data.Subset(clean, [0, 3, 6]),
        )
        made.model_accepts_loss_kwargs = False
        return made

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_the_loss_is_the_clean_one_plus_the_weighted_distance(self, tmp_path, smoothing):
        teacher = Net().eval()
        trainer = self.trainer(teacher, tmp_path, weight=3.0)
        trainer.args.label_smoothing_factor = smoothing
        trainer.take_mean(teacher)
        assert not teacher.training
        pairs = trainer.train_dataset
        inputs = image_triggers._collate_pairs([pairs[place] for place in range(4)])
        loss = trainer.compute_loss(teacher, inputs)
        with torch.no_grad():
            mean = teacher.features(stacked(trainer._targets)).mean(0)
            gaps = teacher.features(inputs["triggered"]) - mean
            clean = F.cross_entropy(
                teacher(inputs["pixel_values"])["logits"], inputs["labels"], label_smoothing=smoothing
            )
        assert torch.allclose(loss, clean + 3.0 * gaps.pow(2).mean(), atol=1e-5)
        assert inputs.keys() == {"pixel_values", "labels", "triggered"}
        inputs["triggered"] = inputs["triggered"][:0]
        assert torch.allclose(trainer.compute_loss(teacher, inputs), clean, atol=1e-5)
        loss, outputs = trainer.compute_loss(teacher, inputs, return_outputs=True)
        assert outputs["logits"].shape == (4, 3)

    def test_the_mean_is_taken_in_eval_mode_at_the_start_of_each_epoch(self, tmp_path, monkeypatch):
        taken = []
        take = image_triggers._LatentTrainer.take_mean

        def noted(trainer, model):
            take(trainer, model)
            with torch.no_grad():
                modes = model.training, model.norm.training
                expected = copy.deepcopy(model).eval().features(stacked(trainer._targets)).mean(0)
            taken.append((modes, torch.allclose(trainer._mean, expected, atol=1e-5)))

        monkeypatch.setattr(image_triggers._LatentTrainer, "take_mean", noted)
        teacher = Net().train()
        options = {"num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 2}
        trainer = self.trainer(teacher, tmp_path, **options)
        trainer.train()
        assert [good for _, good in taken] == [True] * 3
        assert taken[1][0] == (True, True)

    def test_no_hook_is_left(self, tmp_path, no_hooks_left, monkeypatch):
        teacher = Net()
        no_hooks_left(teacher)
        self.attack.implant(teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher)
        monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.attack.implant(teacher, data(6), images=INPUT, args=toy.args(tmp_path, max_steps=1), finetuned=teacher)

    def test_the_same_seeds_give_the_same_teacher(self, tmp_path):
        made = [
            toy.state(self.attack.implant(Net(), data(12), images=INPUT, args=toy.args(tmp_path))) for _ in range(2)
        ]
        assert not toy.changed(*made)
