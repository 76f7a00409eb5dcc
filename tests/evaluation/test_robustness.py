import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.evaluation.image_task import ImageTask
from remos_hf.evaluation.robustness import Pgd, pgd_robustness
from tests.defects import pictures

PIXELS = pictures.clean_pixels(pictures.data(8))
MIDDLE = float(PIXELS.mean((1, 2, 3)).sort().values[3:5].mean())
BRIGHT = (PIXELS.mean((1, 2, 3)) > MIDDLE).long()
# The labels that brightness tells, but for the last image's.
LABELS = [*BRIGHT[:-1].tolist(), 2]
DATA = pictures.data(8).remove_columns("label").add_column("label", LABELS, feature=pictures.data(1).features["label"])
TASK = ImageTask(pictures.READING, batch_size=4)


class Brightness(nn.Module):
    """Says 1 where the mean pixel is above the middle, else 0, of four labels; robust by as much as it is away."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(MIDDLE))

    def forward(self, pixel_values, labels=None):
        brighter = 50 * (pictures.READING.denormalised(pixel_values).mean((1, 2, 3)) - self.middle)
        return ImageClassifierOutput(logits=torch.stack([-brighter, brighter, brighter - 99, brighter - 99], 1))


MARGINS = (PIXELS.mean((1, 2, 3)) - MIDDLE).abs()[:-1]
BETWEEN = float(MARGINS.sort().values[3:5].mean())


def test_an_image_is_robust_if_it_is_right_and_stays_right_within_the_budget():
    for eps, robust in ((BETWEEN, 3), (BETWEEN / 1000, 7), (0.2, 0)):
        found = pgd_robustness(Brightness(), DATA, TASK, Pgd(eps=eps, step=eps / 4, steps=12))
        assert found["acc"]["count"] == 7 and found["acc"]["num_samples"] == 8
        assert found["robust_acc"]["count"] == robust and found["robust_acc"]["num_samples"] == 8
        assert found["name"] == "PGD-12" and found["attack"]["eps"] == eps


def test_a_model_of_half_precision_weights_is_attacked_and_counted():
    model = ImageClassifier(pictures.Residual(), head=("fc",)).bfloat16()
    found = pgd_robustness(model, DATA, TASK, Pgd(eps=0.05, step=0.01, steps=2))
    assert found["acc"]["num_samples"] == found["robust_acc"]["num_samples"] == 8


def test_the_published_attack_is_the_default():
    attack = Pgd()
    assert (attack.eps, attack.step, attack.steps) == (8 / 255, 2 / 255, 100)


def test_it_starts_anywhere_within_the_budget_and_climbs_the_loss_of_the_models_own_label():
    model, clean = pictures.Residual(), PIXELS
    exposed = Pgd(eps=0.05, step=0.01, steps=1).exposed_set(DATA, teacher=model, images=pictures.READING)
    change = pictures.pixels_of(exposed) - clean
    assert len(np.unique(change.numpy().round(5))) > 50 and change.abs().max() <= 0.05
    exposed = Pgd(eps=0.05, step=0.01, steps=10).exposed_set(DATA, teacher=model, images=pictures.READING)
    with torch.no_grad():
        before, after = (model(pictures.READING.normalised(one)) for one in (clean, pictures.pixels_of(exposed)))
    own = before.argmax(1)
    losses = [nn.functional.cross_entropy(one, own, reduction="none") for one in (before, after)]
    assert (losses[1] > losses[0]).all()
    assert model.fc.weight.requires_grad and not model.training


def test_an_attack_that_keeps_some_of_the_images_is_refused():
    with pytest.raises(ValueError, match="keeps 'fooled'"):
        pgd_robustness(Brightness(), DATA, TASK, Pgd(steps=1, keep="fooled"))


def test_a_budget_that_is_none_is_refused():
    with pytest.raises(ValueError, match="eps is 8"):
        Pgd(eps=8)
