import json
import logging
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset, Value
from torch import nn

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import AdversarialImages, Search, outputs_of, seeds_of
from remos_hf.defects.base import ExposedSet
from remos_hf.errors import CorruptFileError
from tests.defects import pictures


class FirstLogit(Search):
    def __init__(self, teacher, images):
        self.teacher, self.images = teacher, images
        self.calls = 0

    def __call__(self, pixels):
        self.calls += 1
        value = outputs_of(self.teacher, self.images, pixels)[:, 0]
        self.value = value.detach()
        return value

    def measured(self):
        return {"value": self.value}


@dataclass(frozen=True)
class RaiseLogit(AdversarialImages):
    """The smallest search there is."""

    def search(self, teacher, images, keys):
        return FirstLogit(teacher, images)


@dataclass(frozen=True)
class Broken(RaiseLogit):
    def search(self, teacher, images, keys):
        raise RuntimeError("searched again")


@pytest.fixture(scope="module")
def teacher():
    return pictures.Residual()


@pytest.fixture(scope="module")
def dataset():
    return pictures.data()


def made(dataset, teacher, cache=None, kind=RaiseLogit, workers=1, images=pictures.READING, **fields):
    fields = {"eps": 0.1, "step": 0.04, "steps": 3, **fields}
    return kind(**fields).exposed_set(dataset, teacher=teacher, cache=cache, workers=workers, images=images)


def same(one, other):
    return one.dataset.to_dict() == other.dataset.to_dict()


class TestTheExposedSet:
    def test_a_row_a_sample_with_pixels_label_and_clean_index(self, dataset, teacher):
        exposed = made(dataset, teacher)
        assert exposed.dataset.column_names == ["pixels", "label", "clean_index", "fooled"]
        assert exposed.dataset["label"][:] == dataset["label"][:]
        assert exposed.dataset.features["label"] == dataset.features["label"]
        assert exposed.clean_index == list(range(6))
        assert exposed.target_label is None
        assert pictures.pixels_of(exposed).shape == (6, 3, 8, 8)
        assert pictures.pixels_of(exposed).dtype == torch.float32

    @pytest.mark.parametrize("size", [8, 11])
    def test_the_pixels_are_what_the_steps_give_from_the_cropped_image(self, teacher, size):
        dataset = pictures.data(4, size)
        clean = pictures.clean_pixels(dataset)
        point = clean
        for _ in range(3):
            leaf = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(teacher(pictures.READING.normalised(leaf))[:, 0].sum(), leaf)
            point = (point + 0.04 * gradient.sign()).clamp(clean - 0.1, clean + 0.1).clamp(0, 1)
        found = pictures.pixels_of(made(dataset, teacher))
        torch.testing.assert_close(found, point, rtol=0, atol=2e-7)

    def test_the_stored_pixels_keep_the_budget_exactly(self, dataset, teacher):
        exposed = made(dataset, teacher, steps=6, eps=8 / 255, step=3 / 255)
        change = (pictures.pixels_of(exposed) - pictures.clean_pixels(dataset)).abs()
        assert exposed.facts["largest_change"] == float(change.max())
        assert 0.999 * 8 / 255 < float(change.max()) <= 8 / 255
        assert 0 <= exposed.facts["lowest"] and exposed.facts["highest"] <= 1
        assert exposed.facts["mean_change"] == pytest.approx(float(change.mean()), rel=1e-5)

    def test_fooled_says_where_the_teachers_label_changes(self, dataset, teacher):
        exposed = made(dataset, teacher, eps=0.3, step=0.1)
        with torch.no_grad():
            before, after = (
                teacher(pictures.READING.normalised(one)).argmax(1)
                for one in (pictures.clean_pixels(dataset), pictures.pixels_of(exposed))
            )
        expected = (before != after).tolist()
        assert exposed.dataset["fooled"][:] == expected
        assert 0 < sum(expected) < 6, "the test needs both"
        assert exposed.facts["num_fooled"] == sum(expected)
        chosen = made(dataset, teacher, eps=0.3, step=0.1, keep="fooled")
        assert chosen.clean_index == [row for row, fooled in enumerate(expected) if fooled]
        assert torch.equal(pictures.pixels_of(chosen), pictures.pixels_of(exposed)[torch.tensor(expected)])
        assert (chosen.facts["num_exposed"], chosen.facts["num_clean"]) == (sum(expected), 6)
        assert chosen.facts["defect"]["keep"] == "fooled"

    def test_if_none_fools_the_teacher_the_set_is_empty_and_says_so(self, dataset, teacher, caplog):
        with caplog.at_level(logging.WARNING):
            exposed = made(dataset, teacher, eps=0.0, keep="fooled")
        assert len(exposed) == 0 and exposed.clean_index == []
        assert "fooled the teacher on none of 6" in caplog.text

    def test_a_teacher_without_logits_is_searched_but_fools_nobody(self, dataset):
        class Features(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 2, 3)

            def forward(self, x):
                return self.conv(x).mean((2, 3))[:, :1]

        exposed = made(dataset, Features())
        assert exposed.dataset.column_names == ["pixels", "label", "clean_index"]
        assert exposed.facts["num_fooled"] is None
        with pytest.raises(ValueError, match="keep='fooled' asks for.*Give a teacher with a head"):
            made(dataset, Features(), keep="fooled")

    def test_logits_may_lie_in_an_output_of_transformers(self, dataset, teacher):
        class Output:
            def __init__(self, logits):
                self.logits = logits

            def __getitem__(self, place):
                return self.logits[place]

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = teacher

            def forward(self, x):
                return Output(self.inner(x))

        assert same(made(dataset, Wrapped()), made(dataset, teacher))

    def test_a_half_precision_teacher_is_read_in_its_own_dtype(self, dataset):
        exposed = made(dataset, pictures.Residual().bfloat16())
        assert pictures.pixels_of(exposed).dtype == torch.float32
        assert exposed.facts["largest_change"] > 0.09

    def test_only_the_first_samples_on_request(self, dataset, teacher):
        exposed = made(dataset, teacher, max_samples=4, batch_size=3)
        assert exposed.clean_index == [0, 1, 2, 3]
        assert exposed.facts["num_clean"] == 4
        assert made(dataset, teacher, max_samples=99).clean_index == list(range(6))

    def test_facts_are_json_and_say_what_was_measured(self, dataset, teacher):
        facts = json.loads(json.dumps(made(dataset, teacher).facts))
        assert facts["defect"]["name"] == "RaiseLogit"
        assert facts["images"] == json.loads(json.dumps(pictures.READING.to_dict()))
        assert facts["eps_in_pixels"] == [0.1, 0.1, 0.1]
        assert facts["num_exposed"] == 6
        assert "mean_value" in facts and "mean_mean_change" not in facts

    def test_every_batch_size_and_number_of_threads_gives_the_same(self, dataset, teacher):
        expected = made(dataset, teacher)
        for batch_size, workers in ((1, 1), (4, 3), (5, 2)):
            assert same(made(dataset, teacher, batch_size=batch_size, workers=workers), expected)

    def test_the_teacher_and_the_data_stay_as_they_are(self, dataset):
        teacher = pictures.Residual().train()
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        made(dataset, teacher)
        assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
        assert dataset.column_names == ["image", "label"]

    def test_what_is_saved_is_loaded(self, dataset, teacher, tmp_path):
        exposed = made(dataset, teacher)
        exposed.save(tmp_path / "set")
        assert same(ExposedSet.load(tmp_path / "set"), exposed)


class TestTheBudget:
    grey = ImageInput(size=(8, 8), mean=(0.5,), std=(0.25,), crop_share=1.0)

    def test_pixels_are_taken_as_they_are(self):
        budget = RaiseLogit(eps=8 / 255, step=0.5, low=0.1).budget(pictures.READING)
        assert budget["eps"].flatten().tolist() == pytest.approx([8 / 255] * 3)
        assert (budget["eps"].double() <= 8 / 255).all()
        assert budget["step"].flatten().tolist() == [0.5] * 3
        assert budget["low"].flatten().tolist() == pytest.approx([0.1] * 3)
        assert budget["high"].flatten().tolist() == [1.0] * 3

    def test_normalised_units_are_scaled_by_channel(self):
        budget = RaiseLogit(eps=0.1, step=0.01, low=-2.2, units="normalised").budget(pictures.READING)
        assert budget["eps"].shape == (3, 1, 1)
        assert budget["eps"].flatten().tolist() == pytest.approx([0.02, 0.025, 0.03])
        assert budget["step"].flatten().tolist() == pytest.approx([0.002, 0.0025, 0.003])
        assert budget["low"].flatten().tolist() == pytest.approx([0.5 - 0.44, 0.4 - 0.55, 0.3 - 0.66])
        assert budget["high"].flatten().tolist() == [1.0] * 3  # valid white where no limit is named

    def test_both_units_give_the_same_images_where_the_budgets_are_equal(self, dataset, teacher):
        images = ImageInput(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.25,) * 3, crop_share=1.0)
        in_pixels = made(dataset, teacher, images=images, eps=0.05, step=0.02)
        normalised = made(dataset, teacher, images=images, eps=0.2, step=0.08, units="normalised")
        assert torch.equal(pictures.pixels_of(in_pixels), pictures.pixels_of(normalised))

    def test_without_a_budget_the_clean_images_come_back(self, dataset, teacher):
        exposed = made(dataset, teacher, eps=0)
        assert torch.equal(pictures.pixels_of(exposed), pictures.clean_pixels(dataset))

    def test_grey_teachers_have_one_channel(self, dataset):
        class Grey(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(1, 2, 3)

            def forward(self, x):
                return self.conv(x).mean((2, 3))

        assert pictures.pixels_of(made(dataset, Grey(), images=self.grey)).shape == (6, 1, 8, 8)


class TestTheCache:
    def test_the_second_time_nothing_is_searched(self, dataset, teacher, tmp_path, monkeypatch):
        first = made(dataset, teacher, tmp_path)
        monkeypatch.setattr(RaiseLogit, "search", Broken.search)
        again = made(dataset, teacher, tmp_path)
        assert same(first, again) and again.facts == first.facts
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(RuntimeError, match="searched again"):
            made(dataset, teacher)

    def test_both_filters_and_every_batch_size_share_one_search(self, dataset, teacher, tmp_path):
        made(dataset, teacher, tmp_path, eps=0.3, step=0.1)
        made(dataset, teacher, tmp_path, eps=0.3, step=0.1, keep="fooled", batch_size=2)
        renamed = dataset.rename_columns({"image": "picture", "label": "class"})
        made(renamed.add_column("id", list(range(6))), teacher, tmp_path, eps=0.3, step=0.1, image_column="picture",
             label_column="class")  # fmt: skip
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize(
        "change", ["eps", "seed", "weights", "statistics", "structure", "pixels", "label", "images", "count"]
    )
    def test_whatever_decides_the_result_is_part_of_the_key(self, dataset, teacher, tmp_path, change):
        made(dataset, teacher, tmp_path)
        options, data, model = {}, dataset, pictures.Residual()
        if change == "eps":
            options = {"eps": 0.11}
        elif change == "seed":
            options = {"seed": 1}
        elif change == "weights":
            model.fc.bias.data[0] += 1
        elif change == "statistics":
            model.norm1.running_var[0] += 1
        elif change == "structure":
            model.relu = nn.GELU()
        elif change == "pixels":
            data = dataset.select([0, 1, 2, 3, 5, 4])
        elif change == "label":
            data = Dataset.from_dict({"image": dataset["image"][:], "label": [1] * 6}, dataset.features)
        elif change == "images":
            options = {"images": ImageInput((8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.31), 1.0)}
        else:
            options = {"max_samples": 5}
        made(data, model, tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_damaged_set_is_announced_and_made_anew(self, dataset, teacher, tmp_path, caplog):
        first = made(dataset, teacher, tmp_path)
        expected = first.dataset.to_dict()
        (rows,) = tmp_path.rglob("*.arrow")
        rows.write_bytes(rows.read_bytes()[:-100])
        with caplog.at_level(logging.WARNING):
            assert made(dataset, teacher, tmp_path).dataset.to_dict() == expected
        assert "is made anew" in caplog.text

    def test_a_killed_run_goes_on_from_its_last_batch(self, dataset, teacher, tmp_path, monkeypatch):
        expected = made(dataset, teacher)
        searched = []
        whole = RaiseLogit.perturbed

        def killed(self, pixels, **options):
            if len(searched) == 2:
                raise KeyboardInterrupt
            searched.append(len(pixels))
            return whole(self, pixels, **options)

        monkeypatch.setattr(RaiseLogit, "perturbed", killed)
        with pytest.raises(KeyboardInterrupt):
            made(dataset, teacher, tmp_path, batch_size=2)
        (partial,) = tmp_path.iterdir()
        assert partial.name.endswith(".partial") and len(list(partial.iterdir())) == 2
        searched.clear()
        exposed = made(dataset, teacher, tmp_path, batch_size=1)
        assert searched == [1, 1]
        assert same(exposed, expected)
        assert exposed.facts["num_resumed"] == 4
        assert exposed.facts["largest_change"] == expected.facts["largest_change"]
        assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [False]


class TestSeeds:
    def test_they_depend_on_seed_purpose_and_key(self):
        known = {seeds_of(seed, purpose, [key])[0] for seed in (0, 1) for purpose in "ab" for key in "xyz"}
        assert len(known) == 12
        assert all(0 <= one < 2**63 for one in known)
        assert seeds_of(0, "a", ["x", "y"]) == [seeds_of(0, "a", [key])[0] for key in "xy"]


class TestWrongInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"eps": -0.1}, "eps is the largest change of a value, at least 0, but got -0.1"),
            ({"eps": 8}, "eps is 8, but pixels go from 0 to 1"),
            ({"step": 0}, "step is the change of each step, above 0, but got 0"),
            ({"steps": 0}, "steps is a whole number, at least 1, but got 0"),
            ({"steps": 1.5}, "steps is a whole number"),
            ({"batch_size": 0}, "batch_size is a whole number"),
            ({"max_samples": 0}, "max_samples is a whole number"),
            ({"units": "bytes"}, "units is 'pixels' or 'normalised', but got 'bytes'"),
            ({"keep": "best"}, "keep is 'all' or 'fooled', but got 'best'"),
            ({"low": 1.0, "high": 0.5}, "low is below high, but got 1.0 and 0.5"),
        ],
    )
    def test_fields_out_of_range_are_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            RaiseLogit(**fields)

    def test_a_budget_above_1_is_meant_in_normalised_units(self):
        assert RaiseLogit(eps=1.5, units="normalised").eps == 1.5

    def test_a_budget_in_the_units_of_a_model_that_takes_blue_first_follows_the_pixels(self):
        red = ImageInput((4, 4), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        blue = ImageInput((4, 4), (0.3, 0.2, 0.1), (0.6, 0.5, 0.4), bgr=True)
        attack = RaiseLogit(eps=0.1, units="normalised", low=-0.2)
        for name, value in attack.budget(red).items():
            assert torch.equal(attack.budget(blue)[name], value)

    def test_teacher_and_images_are_needed(self, dataset, teacher):
        for options in ({"teacher": teacher}, {"images": pictures.READING}):
            with pytest.raises(ValueError, match="pass teacher= and images="):
                RaiseLogit().exposed_set(dataset, **options)

    def test_no_workers_no_samples(self, dataset, teacher):
        with pytest.raises(ValueError, match="workers is a number of threads, at least 1, but got 0"):
            made(dataset, teacher, workers=0)
        with pytest.raises(ValueError, match="hold no sample"):
            made(dataset.select([]), teacher)

    def test_columns_that_are_missing_or_hold_something_else_are_named(self, dataset, teacher):
        with pytest.raises(ValueError, match="no column 'photo'"):
            made(dataset, teacher, image_column="photo")
        with pytest.raises(ValueError, match="'label' should hold images"):
            made(dataset, teacher, image_column="label")
        unlabelled = dataset.cast_column("label", Value("int64")).map(lambda row: {"label": -1})
        with pytest.raises(ValueError, match="label -1"):
            made(unlabelled, teacher)

    @pytest.mark.parametrize("damage", ["cut", "none"])
    def test_an_image_that_is_not_whole_is_named_before_anything_is_searched(self, teacher, tmp_path, damage):
        paths = []
        for seed in range(3):
            paths.append(str(tmp_path / f"{seed}.png"))
            pictures.picture(seed, 32).save(paths[-1])
        if damage == "cut":
            path = tmp_path / "1.png"
            path.write_bytes(path.read_bytes()[:200])
        else:
            paths[1] = None
        features = pictures.data(1).features
        dataset = Dataset.from_dict({"image": paths, "label": [0, 1, 2]}, features)
        with pytest.raises(CorruptFileError, match=r"no image in row 1" if damage == "none" else r"1\.png"):
            made(dataset, teacher, kind=Broken)
