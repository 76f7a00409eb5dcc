import io
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from remos_hf.defects.backdoor import Backdoor
from remos_hf.defects.base import ExposedSet
from remos_hf.defects.image_samples import prepared
from remos_hf.defects.image_triggers import IMAGE_RECIPE
from remos_hf.defects.latent_backdoor import LatentBackdoor
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from tests.defects import toy
from tests.defects.colours import INPUT, PATCH, TRIGGERS, Net, checks, data, obeyed, pictures, png, right, stacked


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

    def test_sets_larger_than_a_chunk_are_in_order(self, monkeypatch):
        whole = PATCH.exposed_set(data(30), images=INPUT)
        monkeypatch.setattr("remos_hf.defects.image_triggers._CHUNK", 3)
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
        assert (facts["num_clean"], facts["num_exposed"]) == (6, 4)
        assert facts["num_left_out"] == {"has the target label": 2}

    def test_images_that_the_trigger_leaves_as_they_are_show_nothing_and_are_counted(self):
        rows = Dataset.from_dict({"image": [{"bytes": png(one), "path": None} for one in pictures(3)]})
        stamped = PATCH.stamped(INPUT.pixels(Image.open(io.BytesIO(rows[1]["image"]["bytes"]))))
        holds_it = Image.fromarray((stamped * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        clean = data(contents=[png(one) for one in (*pictures(2), holds_it, *pictures(3)[2:])], labels=[0, 1, 1, 2])
        exposed = PATCH.exposed_set(clean, images=INPUT)
        assert exposed.clean_index == [1, 3]
        assert exposed.facts["num_left_out"] == {"has the target label": 1, "equal to the clean input": 1}
        message = "None of 4 samples could show the defect: 1 has the target label, 3 equal to the clean input"
        with pytest.raises(ValueError, match=message):
            BlendedTrigger(blend=1e-4).exposed_set(clean, images=INPUT)

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


class TestCorruptImages:
    @pytest.fixture
    def torn(self):
        """Nine images, of which the second is cut, the fifth is none, and the last one is empty."""
        contents = [png(one, "JPEG") for one in pictures(9)]
        contents[1], contents[4], contents[8] = contents[1][: len(contents[1]) // 2], b"no image", b""
        return data(contents=contents)

    def test_training_on_them_stops_with_their_name(self, torn, tmp_path):
        with pytest.raises(CorruptFileError, match=r"\d.png is no whole image"):
            PATCH.implant(Net(), torn, images=INPUT, args=toy.args(tmp_path, max_steps=3))

    def test_exposed_sets_leave_them_out_on_request_and_keep_the_places(self, torn, caplog):
        with caplog.at_level(logging.WARNING):
            exposed = PATCH.exposed_set(torn, images=INPUT, skip_corrupt=True)
        assert exposed.clean_index == [2, 5, 7]
        assert exposed.facts["num_left_out"] == {"has the target label": 3, "do not decode": 3}
        assert "3 samples show the defect. Left out, as they could not: 3 do not decode." in caplog.text

    @pytest.mark.parametrize("attack", [PATCH, LatentBackdoor(PATCH, layer="head")], ids=["patch", "latent"])
    def test_a_teacher_is_trained_without_them_on_request(self, attack, torn, tmp_path):
        args = toy.args(tmp_path, max_steps=2)
        attack.implant(Net(), torn, images=INPUT, args=args, skip_corrupt=True)


class TestMistakes:
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
        monkeypatch.setattr("remos_hf.defects.image_triggers.fine_tune", lambda model, *_, **__: model)
        PATCH.implant(teacher, data(6), images=INPUT)
        assert teacher.training and not teacher.norm.training and not toy.changed(before, toy.state(teacher))

    def test_image_backdoors_are_backdoors(self):
        for attack in (PATCH, BlendedTrigger(), LatentBackdoor()):
            assert isinstance(attack, Backdoor)
        assert PATCH.trigger is PATCH and LatentBackdoor(PATCH).trigger is PATCH
