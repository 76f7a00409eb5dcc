import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from PIL import Image

from remos_hf.adapters.images import ImageInput
from remos_hf.defects.image_samples import prepared, whole_images
from remos_hf.errors import CorruptFileError
from tests.defects.colours import INPUT, PATCH, data, pictures, png, stacked


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

    def test_on_request_they_are_left_out_and_counted_in_the_log(self, torn, caplog):
        with caplog.at_level(logging.WARNING):
            assert whole_images(torn)["label"][:] == [0, 2, 0, 2, 0, 1]
        assert "Left out 3 of 9 images that do not decode: 1.png, 4.png, 8.png." in caplog.text
        poisoned = replace(PATCH, poison_rate=0.5).poison(torn, INPUT, skip_corrupt=True)
        assert len(poisoned) == 6 and len(poisoned.poisoned) == 3 and stacked(poisoned).shape == (6, 3, 8, 8)

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


class TestReading:
    def test_pixels_may_be_floats_too(self):
        pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
        features = Features({"pixels": Array3D((3, 8, 8), "float32"), "label": Value("int64")})
        samples = prepared(Dataset.from_dict({"pixels": pixels, "label": [0, 1]}, features), INPUT)
        assert torch.equal(stacked(samples), INPUT.normalised(torch.from_numpy(pixels)))

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


class TestMistakes:
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
