import pytest
import torch
from torch import nn

from remos_hf.defects.feature_away import FeatureAway
from tests.defects import pictures

SMALL = {"eps": 0.1, "step": 0.03, "steps": 4, "layer": "fc"}


@pytest.fixture(scope="module")
def teacher():
    return pictures.Residual()


@pytest.fixture(scope="module")
def dataset():
    return pictures.data()


def made(dataset, teacher, **fields):
    return FeatureAway(**{**SMALL, **fields}).exposed_set(dataset, teacher=teacher, images=pictures.READING)


def features(teacher, pixels):
    inner, teacher.fc = teacher.fc, nn.Identity()
    try:
        return teacher(pictures.READING.normalised(pixels))
    finally:
        teacher.fc = inner


def pixels_of(exposed):
    return torch.tensor(exposed.dataset["pixels"])


def test_the_objective_is_the_squared_distance_from_the_clean_feature(dataset, teacher):
    clean = pictures.clean_pixels(dataset)
    search = FeatureAway(layer="fc").search(teacher, pictures.READING, "abcdef")
    search.begin(clean)
    moved = clean * 0.9
    wanted = (features(teacher, moved) - features(teacher, clean)).square().sum(1)
    torch.testing.assert_close(search(moved), wanted)
    assert not search(clean).any()


def test_features_end_further_away_than_a_random_point_of_the_budget(dataset, teacher):
    clean = pictures.clean_pixels(dataset)
    start = features(teacher, clean)
    far = (features(teacher, pixels_of(made(dataset, teacher))) - start).norm(dim=1)
    near = (features(teacher, clean + 0.1 * torch.sign(torch.randn(clean.shape))) - start).norm(dim=1)
    assert far.mean() > 1.5 * near.mean()


def test_images_stay_in_the_budget_and_do_not_depend_on_the_batch(dataset, teacher):
    clean, found = pictures.clean_pixels(dataset), pixels_of(made(dataset, teacher))
    assert (found - clean).abs().max() <= 0.1 and 0 <= found.min() and found.max() <= 1
    torch.testing.assert_close(pixels_of(made(dataset, teacher, batch_size=1)), found, atol=1e-4, rtol=0)


def test_it_says_how_far_the_features_went_and_of_which_layer(dataset, teacher):
    exposed = made(dataset, teacher)
    assert exposed.facts["layer"] == "fc" and exposed.target_label is None
    assert exposed.facts["mean_distance_last"] > 0
