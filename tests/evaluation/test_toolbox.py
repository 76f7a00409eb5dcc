import numpy as np
import pytest
import torch

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.adversarial_images import logits_of
from tests.defects import pictures

pytest.importorskip("art")
from remos_hf.evaluation.toolbox import estimator_of  # noqa: E402


def test_a_wrapped_model_says_of_pixels_what_the_model_says():
    model, images = pictures.Residual().eval(), ImageInput((8, 8))
    pixels = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    found = estimator_of(model, images, pixels)
    with torch.no_grad():
        expected = logits_of(model, images, torch.from_numpy(pixels))
    assert np.allclose(found.predict(pixels, batch_size=2), expected, atol=1e-6)
    assert found.nb_classes == expected.shape[1]
