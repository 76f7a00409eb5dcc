import numpy as np
import pytest
import torch

from remos_hf.applications import image_attacks
from remos_hf.applications.image_attacks import ABSENT, ATTACKS, attack_images, shuffled_changes
from remos_hf.defects.adversarial_images import logits_of
from tests.defects import pictures
from tests.defects.pictures import READING

PIXELS = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def labels(model, pixels):
    with torch.no_grad():
        return logits_of(model, READING, pixels).argmax(1)


@pytest.fixture(scope="module")
def model():
    return pictures.Residual(inplace=False).eval()


@pytest.mark.parametrize("name", ["fgsm_8", "pgd_8"])
def test_budgets_are_kept_and_loss_is_climbed(model, name):
    found = attack_images(model, READING, PIXELS, name)
    assert float((found - PIXELS).abs().max()) <= 8 / 255 + 1e-6
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    own = labels(model, PIXELS)
    loss = [torch.nn.functional.cross_entropy(logits_of(model, READING, one), own) for one in (PIXELS, found)]
    assert loss[1] > loss[0]


def test_more_steps_find_more(model):
    own = labels(model, PIXELS)
    changed = [
        int((labels(model, attack_images(model, READING, PIXELS, name)) != own).sum()) for name in ("fgsm_2", "pgd_8")
    ]
    assert changed[0] <= changed[1]


def test_blur_is_as_little_as_it_takes(model):
    found = attack_images(model, READING, PIXELS, "blur")
    failed = labels(model, found) == labels(model, PIXELS)
    assert bool(((found - PIXELS).flatten(1).abs().amax(1) > 0).all())
    rough = [float(one.std()) for one in found]
    # Those that never changed were blurred to the end.
    assert all(rough[place] <= min(rough) + 0.2 for place in failed.nonzero()[:, 0].tolist())


def test_blur_leaves_an_image_that_changed(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        image_attacks, "gaussian_filter", lambda pixels, sigma: calls.append(len(pixels)) or pixels * 0 + sigma[2]
    )

    class Threshold(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, pixel_values):
            bright = READING.denormalised(pixel_values).mean((1, 2, 3)) * self.scale
            return torch.stack([0 * bright + 0.5, bright], 1)

    found = attack_images(Threshold(), READING, torch.full((2, 3, 8, 8), 0.1), "blur")
    assert found[0, 0, 0, 0] == pytest.approx(0.53125) and calls[-1] == 2 and len(calls) == 17


@pytest.mark.parametrize("name", [one for one in ATTACKS if one[:4] not in ("fgsm", "pgd_", "blur")])
def test_the_toolbox_attacks_as_it_is_asked_to(model, name, monkeypatch):
    pytest.importorskip("art")
    for module, shorter in (("PixelAttack", {"max_iter": 1}), ("BoundaryAttack", {"max_iter": 5})):
        attack = getattr(image_attacks.toolbox().attacks.evasion, module)
        monkeypatch.setattr(attack, "__init__", quicker(attack.__init__, shorter))
    found = attack_images(model, READING, PIXELS[:2], name, seed=1)
    assert found.shape == (2, 3, 8, 8) and found.dtype == torch.float32
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    torch.rand(1)
    np.random.rand(1)  # noqa: NPY002 - the state that the toolbox draws from
    assert torch.equal(found, attack_images(model, READING, PIXELS[:2], name, seed=1))


def test_the_spatial_attack_looks_for_a_change_of_every_image():
    pytest.importorskip("art")

    class UpperLeft(torch.nn.Module):
        """Whether its upper left quarter is brighter than its upper right one."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, pixel_values):
            left, right = (half[:, :, :4].mean((1, 2, 3)) * self.scale for half in pixel_values.split(4, dim=3))
            return torch.stack([right, left], 1)

    # Nothing changes the first: every turn and shift leaves it the darker left. The second is turned far enough.
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[0, :, :, 6:] = 1
    pixels[1, :, 1, 5], pixels[1, :, 4:6, :2] = 0.3, 1
    model = UpperLeft().eval()
    found = attack_images(model, READING, pixels, "spatial")
    assert (labels(model, found) != labels(model, pixels)).tolist() == [False, True]


def quicker(make, shorter):
    return lambda self, *given, **options: make(self, *given, **{**options, **shorter})


def test_a_model_is_put_back_and_an_unknown_attack_refused(model):
    model.train()
    attack_images(model, READING, PIXELS, "fgsm_2")
    assert model.training and model.fc.weight.requires_grad
    model.eval()
    with pytest.raises(ValueError, match=f"'adef' here: {ABSENT['adef']}"):
        attack_images(model, READING, PIXELS, "adef")
    with pytest.raises(ValueError, match="There are fgsm_2"):
        attack_images(model, READING, PIXELS, "fgsm")


def test_shuffled_changes_are_the_same_values_elsewhere():
    middle = PIXELS * 0.4 + 0.3
    attacked = middle + 0.1 * (torch.rand(middle.shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    noise = shuffled_changes(middle, attacked, seed=0)
    for one, other in zip((attacked - middle).flatten(2), (noise - middle).flatten(2), strict=True):
        assert torch.allclose(one.sort(1).values, other.sort(1).values, atol=1e-6)
    assert not torch.allclose(noise, attacked)
    assert torch.equal(noise, shuffled_changes(middle, attacked, seed=0))
    assert not torch.equal(noise, shuffled_changes(middle, attacked, seed=1))
    with pytest.raises(ValueError, match="same images"):
        shuffled_changes(middle, attacked[:2])
