import numpy as np
import pytest
import torch
from torch import nn

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.defects.feature_attack import FeatureAttack
from remos_hf.errors import UnsupportedModelError
from remos_hf.perturbation import random_start
from tests import tiny
from tests.defects import pictures

SMALL = {"eps": 0.1, "step": 0.03, "steps": 3, "layer": "fc"}


@pytest.fixture(scope="module")
def teacher():
    return pictures.Residual()


@pytest.fixture(scope="module")
def dataset():
    return pictures.data()


def made(dataset, teacher, attack=None, **fields):
    attack = attack or FeatureAttack(**{**SMALL, **fields})
    return attack.exposed_set(dataset, teacher=teacher, images=pictures.READING)


def feature(teacher, pixels):
    """The input of the teacher's head, computed by hand."""
    inner, teacher.fc = teacher.fc, nn.Identity()
    try:
        return teacher(pictures.READING.normalised(pixels))
    finally:
        teacher.fc = inner


def value(features, neuron=0, height=1000.0, weight=0.1):
    """The published objective, sample by sample and neuron by neuron."""
    values = []
    for sample in features:
        others = [one**2 for place, one in enumerate(sample) if place != neuron]
        values.append(-((sample[neuron] - height) ** 2 + weight * sum(others) / len(others)))
    return torch.stack(values)


class TestTheObjective:
    @pytest.mark.parametrize(("neuron", "height", "weight"), [(0, 1000.0, 0.1), (3, 5.0, 2.0), (5, 1.0, 0.0)])
    def test_it_is_the_published_one(self, dataset, teacher, neuron, height, weight):
        pixels = pictures.clean_pixels(dataset)
        attack = FeatureAttack(neuron=neuron, height=height, others_weight=weight, layer="fc")
        found = attack.search(teacher, pictures.READING, "abcdef")(pixels)
        torch.testing.assert_close(found, value(feature(teacher, pixels), neuron, height, weight))

    @pytest.mark.parametrize(("neuron", "height", "weight"), [(0, 1000.0, 0.1), (3, 1.0, 5.0)])
    def test_the_images_are_those_of_a_slow_reference(self, dataset, teacher, neuron, height, weight):
        fields = {"neuron": neuron, "height": height, "others_weight": weight, "random_start": False}
        clean = pictures.clean_pixels(dataset)
        point = clean
        for _ in range(3):
            leaf = point.clone().requires_grad_()
            loss = value(feature(teacher, leaf), neuron, height, weight).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            point = (point + 0.03 * gradient.sign()).clamp(clean - 0.1, clean + 0.1).clamp(0, 1)
        found = pictures.pixels_of(made(dataset, teacher, **fields))
        # Signs of gradients next to 0 may fall either way.
        assert ((found - point).abs() < 1e-6).float().mean() > 0.99

    def test_the_neuron_rises(self, dataset, teacher):
        exposed = made(dataset, teacher, neuron=2, steps=6, random_start=False)
        before = feature(teacher, pictures.clean_pixels(dataset))[:, 2]
        after = feature(teacher, pictures.pixels_of(exposed))[:, 2]
        assert (after > before).all()
        assert exposed.facts["mean_neuron_first"] == pytest.approx(before.mean().item(), rel=1e-5)
        assert exposed.facts["mean_neuron_first"] < exposed.facts["mean_neuron_last"] < after.mean().item()

    def test_labels_are_never_looked_at(self, dataset, teacher):
        others = dataset.remove_columns("label").add_column("label", [3, 3, 3, 0, 0, 1])
        assert torch.equal(pictures.pixels_of(made(dataset, teacher)), pictures.pixels_of(made(others, teacher)))


class TestTheLayer:
    def test_the_adapter_names_it(self, dataset, teacher):
        wrapped = ImageClassifier(pictures.Residual(), head=("fc",))
        exposed = made(dataset, wrapped, layer=None)
        assert exposed.facts["layer"] == "body.fc"
        assert torch.equal(pictures.pixels_of(exposed), pictures.pixels_of(made(dataset, teacher)))

    def test_a_vision_transformer_of_transformers_tells_its_own(self, dataset):
        exposed = made(dataset, tiny.vit(), layer=None, eps=0.05)
        assert exposed.facts["layer"] == "classifier"
        assert exposed.facts["largest_change"] > 0.04

    def test_a_feature_may_end_in_positions_of_size_one(self, dataset, teacher):
        class Pooled(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.fc = teacher, nn.Conv2d(4, 2, 1)

            def forward(self, x):
                return self.fc(self.body(x)[:, :, None, None]).flatten(1)

        assert made(dataset, Pooled()).facts["largest_change"] > 0.09

    def test_a_teacher_that_does_not_tell_its_head_is_refused(self, dataset, teacher):
        with pytest.raises(UnsupportedModelError, match="no classifier whose input is its penultimate feature"):
            made(dataset, teacher, layer=None)

    def test_a_layer_that_is_not_there_or_never_runs_is_refused(self, dataset):
        teacher = pictures.Residual()
        teacher.spare = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="Residual has no 'head'.*'fc'"):
            made(dataset, teacher, layer="head")
        with pytest.raises(UnsupportedModelError, match="'spare' never ran"):
            made(dataset, teacher, layer="spare")

    def test_a_map_is_no_feature(self, dataset, teacher):
        with pytest.raises(UnsupportedModelError, match=r"'conv' should be a feature .*\(6, 6, 8, 8\).*pooling"):
            made(dataset, teacher, layer="conv")

    def test_no_hook_stays(self, dataset, no_hooks_left):
        teacher = pictures.Residual()
        made(dataset, teacher)
        no_hooks_left(teacher)


class TestTheStart:
    def test_it_is_drawn_around_the_clean_image_and_clipped(self, dataset, teacher):
        attack = FeatureAttack(**SMALL)
        clean = pictures.clean_pixels(dataset)
        start = attack.start(clean, attack.budget(pictures.READING)["eps"], "abcdef")
        change = (start - clean).abs()
        assert 0.099 < change.max() <= 0.1000001 and change.mean() > 0.04
        found, _ = FeatureAttack(**{**SMALL, "step": 1e-9, "steps": 1}).perturbed(
            clean, teacher=teacher, images=pictures.READING, keys="abcdef"
        )
        torch.testing.assert_close(found, start.clamp(0, 1), rtol=0, atol=1e-6)

    def test_it_depends_on_the_seed_and_the_image_alone(self, dataset, teacher):
        whole = pictures.pixels_of(made(dataset, teacher))
        order = [4, 1, 5]
        some = pictures.pixels_of(made(dataset.select(order), teacher, batch_size=2))
        assert torch.equal(some, whole[order])
        assert not torch.equal(whole, pictures.pixels_of(made(dataset, teacher, seed=1)))

    def test_images_that_differ_start_differently(self, dataset):
        attack, clean = FeatureAttack(**SMALL), pictures.clean_pixels(dataset)
        change = attack.start(clean, torch.full((3, 1, 1), 0.1), "abcdef") - clean
        assert not torch.allclose(change[0], change[1], atol=0.01)

    def test_without_it_the_search_starts_at_the_image(self, dataset, teacher):
        fields = {"random_start": False, "step": 1e-9, "steps": 1}
        found = pictures.pixels_of(made(dataset, teacher, **fields))
        torch.testing.assert_close(found, pictures.clean_pixels(dataset), rtol=0, atol=1e-6)


class TestPresets:
    def test_the_paper_in_normalised_units(self):
        attack = FeatureAttack.paper(layer="fc")
        assert (attack.eps, attack.step, attack.steps, attack.low, attack.high) == (0.1, 0.01, 40, -2.2, 2.2)
        assert (attack.units, attack.random_start, attack.keep, attack.layer) == ("normalised", True, "all", "fc")
        assert (attack.neuron, attack.height, attack.others_weight) == (0, 1000.0, 0.1)

    def test_the_paper_steps_in_normalised_space(self, dataset, teacher):
        """The whole attack as published, on normalised images: same start, clip and steps."""
        attack = FeatureAttack.paper(layer="fc", steps=4)
        clean = pictures.clean_pixels(dataset)
        budget = attack.budget(pictures.READING)
        start = attack.start(clean, budget["eps"], "abcdef")
        images, point = pictures.READING.normalised(clean), pictures.READING.normalised(start).clamp(-2.2, 2.2)
        for _ in range(4):
            leaf = point.clone().requires_grad_()
            loss = value(feature(teacher, pictures.READING.denormalised(leaf))).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            point = (point + 0.01 * gradient.sign()).clamp(images - 0.1, images + 0.1).clamp(-2.2, 2.2)
        found, _ = attack.perturbed(clean, teacher=teacher, images=pictures.READING, keys="abcdef")
        near = (pictures.READING.normalised(found) - point).abs() < 1e-5
        assert near.float().mean() > 0.99

    def test_the_papers_clip_moves_white_by_more_than_the_budget(self, teacher):
        white = torch.ones(1, 3, 8, 8)
        found, _ = FeatureAttack.paper(layer="fc", steps=2).perturbed(
            white, teacher=teacher, images=pictures.READING, keys=["white"]
        )
        highest = pictures.READING.normalised(found).amax((0, 2, 3))
        assert (highest <= 2.2 + 1e-6).all()
        # The third channel's white is (1 - 0.3) / 0.3 = 2.33: within the budget of 2.2 + 0.1 it would stay above 2.23.
        assert pictures.READING.normalised(white)[0, 2].max() > 2.33
        assert (white - found)[0, 2].min() > 0.1 * 0.3

    def test_the_equivalent_budget_in_pixels(self):
        attack = FeatureAttack.paper_in_pixels(steps=7)
        assert attack.eps * 255 == pytest.approx(5.763)
        assert attack.step == pytest.approx(attack.eps / 10)
        assert (attack.units, attack.low, attack.high, attack.steps) == ("pixels", None, None, 7)

    def test_fields_are_json_values(self):
        assert FeatureAttack.paper().to_dict()["name"] == "FeatureAttack"
        assert all(isinstance(one, (int, float, str, type(None))) for one in FeatureAttack.paper().to_dict().values())


class TestWrongInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"neuron": -1}, "neuron is a place in the feature, counted from 0, but got -1"),
            ({"neuron": 0.5}, "neuron is a place"),
            ({"others_weight": -0.1}, "others_weight is at least 0, but got -0.1"),
        ],
    )
    def test_fields_out_of_range_are_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            FeatureAttack(**fields)

    def test_a_neuron_that_the_feature_does_not_have_is_refused(self, dataset, teacher):
        with pytest.raises(ValueError, match=r"neuron is 6, but the input of 'fc' has 6 neurons \(0 to 5\)"):
            made(dataset, teacher, neuron=6)


def test_the_random_start_is_the_one_of_the_key():
    clean = torch.zeros(2, 3, 4, 4)
    eps = torch.full((3, 1, 1), 0.1)
    attack = FeatureAttack(seed=3)
    one = attack.start(clean, eps, ["a", "b"])
    assert np.array_equal(one[1:].numpy(), attack.start(clean[1:], eps, ["b"]).numpy())
    assert not torch.equal(one, random_start(clean, eps=eps, generators=torch.Generator().manual_seed(3)))
