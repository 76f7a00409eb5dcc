import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from remos_hf.adapters.images import to_pixels
from remos_hf.defects.image_samples import image_key
from remos_hf.defects.latent_backdoor import LatentBackdoor
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger
from remos_hf.errors import CorruptFileError
from tests.defects.colours import INPUT, PATCH, PLACES, TRIGGERS, Net, checks, data, png


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

    @settings(max_examples=60, deadline=None)
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

    @pytest.mark.parametrize("kind", [PatchTrigger, BlendedTrigger])
    def test_a_file_that_is_not_there_or_no_image_is_refused_at_once(self, kind, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no '.*none.png'"):
            kind(file=str(tmp_path / "none.png"))
        (tmp_path / "bad.png").write_bytes(b"no image")
        with pytest.raises(CorruptFileError, match="bad.png is no whole image"):
            kind(file=str(tmp_path / "bad.png"))
