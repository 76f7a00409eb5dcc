import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from remos_hf.adapters.images import ImageInput, as_mode, check_pixels, decoded, image_input_of
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from tests import tiny

GREY_WORLD = ImageInput(size=(6, 6), mean=(0.5,), std=(0.5,), crop_share=1.0)


def picture(width=13, height=9, mode="RGB", seed=0):
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values, mode)


def file_bytes(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.timm
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode"), [(0.875, "center"), (1.0, "center"), (0.9, "center"), (0.9, "squash")]
)
def test_images_are_read_as_timm_reads_them_to_the_bit(interpolation, crop_pct, crop_mode):
    from timm.data import create_transform

    config = {
        "input_size": (3, 16, 16),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    ours, theirs = ImageInput.of_config(config), create_transform(**config, is_training=False)
    for seed, (width, height) in enumerate([(37, 23), (23, 38), (17, 17), (16, 16), (5, 11), (31, 64)]):
        image = picture(width, height, seed=seed)
        assert torch.equal(ours.normalised(ours.pixels(image)), theirs(image)), (width, height)


@pytest.mark.timm
def test_other_shapes_than_squares_are_read_as_timm_reads_them():
    from timm.data import create_transform

    config = {"input_size": (3, 12, 20), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8}
    ours = ImageInput.of_config({**config, "interpolation": "bilinear"})
    theirs = create_transform(**config, interpolation="bilinear", is_training=False)
    for width, height in [(37, 23), (23, 38), (50, 30)]:
        image = picture(width, height)
        assert torch.equal(ours.normalised(ours.pixels(image)), theirs(image)), (width, height)


def test_a_small_crop_is_the_middle_of_the_image():
    image = picture(8, 8)
    cropped = ImageInput(size=(4, 4), crop_share=0.5).pixels(image)  # 4 of 8: nothing is resized
    assert torch.equal(cropped, torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[:, 2:6, 2:6] / 255)


def test_squashing_keeps_the_edges_that_a_crop_loses():
    image = Image.new("RGB", (30, 10))
    image.paste("white", (0, 0, 10, 10))  # the left third
    options = {"size": (10, 10), "crop_share": 1.0, "interpolation": "nearest"}
    assert ImageInput(**options).pixels(image).sum() == 0
    assert ImageInput(**options, squash=True).pixels(image).mean() == pytest.approx(1 / 3, abs=0.07)


def test_denormalised_undoes_normalised_for_single_images_and_batches():
    reading = ImageInput(size=(4, 4))
    for shape in [(3, 4, 4), (2, 3, 4, 4)]:
        pixels = torch.rand(shape)
        assert torch.allclose(reading.denormalised(reading.normalised(pixels)), pixels, atol=1e-6)
    assert torch.allclose(reading.normalised(torch.zeros(3, 1, 1)).flatten()[1], torch.tensor(-0.456 / 0.224))


def test_a_model_that_takes_blue_first_gets_it_with_its_own_means_and_pixels_stay_red_first():
    means, pixels = (129.2, 104.7, 93.6), torch.rand(2, 3, 4, 4)  # as VGGFace in Caffe: 0 to 255, blue first
    means = tuple(one / 255 for one in reversed(means))
    reading = ImageInput((4, 4), means, (1 / 255,) * 3, bgr=True)
    red, green, blue = pixels.unbind(1)
    expected = 255 * torch.stack([blue - means[0], green - means[1], red - means[2]], 1)
    assert torch.allclose(reading.normalised(pixels), expected, atol=1e-4)
    assert torch.equal(reading.normalised(pixels)[0], reading.normalised(pixels[0]))
    assert torch.allclose(reading.denormalised(reading.normalised(pixels)), pixels, atol=1e-6)
    image = picture(4, 4)
    assert torch.equal(reading.pixels(image), ImageInput((4, 4)).pixels(image))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_whole_numbers_are_no_pixels(dtype):
    with pytest.raises(TypeError, match=f"got a tensor of {dtype}. Divide bytes by 255"):
        ImageInput().normalised(torch.zeros(3, 2, 2, dtype=dtype))
    check_pixels(torch.zeros(3, 2, 2, dtype=torch.float16))


def test_a_grey_image_fills_all_channels_alike_and_a_colour_image_can_be_read_grey():
    grey = picture(6, 6, "L")
    pixels = ImageInput(size=(6, 6), crop_share=1.0).pixels(grey)
    assert pixels.shape == (3, 6, 6)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    assert torch.equal(GREY_WORLD.pixels(grey), pixels[:1])
    assert GREY_WORLD.pixels(picture(6, 6)).shape == (1, 6, 6)


def test_what_is_transparent_becomes_white_and_the_rest_stays():
    image = picture(6, 6, "RGBA")
    alpha = np.zeros((6, 6), dtype=np.uint8)
    alpha[:, :3] = 255
    image.putalpha(Image.fromarray(alpha))
    image = decoded(file_bytes(image))  # as a 4-channel PNG
    pixels = ImageInput(size=(6, 6), crop_share=1.0).pixels(image)
    colours = torch.from_numpy(np.asarray(image)[..., :3].copy()).permute(2, 0, 1) / 255
    assert torch.equal(pixels[..., :3], colours[..., :3])
    assert (pixels[..., 3:] == 1).all()
    assert as_mode(picture(6, 6, "LA"), "L").mode == "L"


RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
# Every form in which files hold this ramp of grey, which is RAMP >> 8 in 8 bits.
RAMPS = {
    "16 bits": (RAMP, "PNG"),
    "16 bits, big end first": (RAMP.astype(">u2"), "TIFF"),
    "16 bits, portable": (RAMP.astype(np.int32), "PPM"),
    "floats to 1": ((RAMP >> 8).astype(np.float32) / 255, "TIFF"),
    "floats to 255": ((RAMP >> 8).astype(np.float32), "TIFF"),
    "32 bits to 255": ((RAMP >> 8).astype(np.int32), "TIFF"),
    "32 bits to 65535": (RAMP.astype(np.int32), "TIFF"),
    "32 bits to 2^31": (RAMP.astype(np.int32) << 15, "TIFF"),
    "32 bits to 2^32": (RAMP.astype(np.int32) << 16, "TIFF of no sign"),
}


@pytest.mark.parametrize("form", RAMPS)
def test_deep_grey_keeps_its_shades(form):
    values, kind = RAMPS[form]
    kind, _, unsigned = kind.partition(" of ")
    raw = file_bytes(Image.fromarray(values), kind)
    if unsigned:  # PIL writes none, so the value of SampleFormat is changed
        raw = raw.replace(b"\x53\x01\x03\0\x01\0\0\0\x02", b"\x53\x01\x03\0\x01\0\0\0\x01")
    with Image.open(io.BytesIO(raw)) as opened:
        for image in (decoded(raw), opened):  # as `datasets` decodes it
            assert np.array_equal(np.asarray(as_mode(image, "L")), RAMP >> 8)


def test_a_file_that_says_that_white_is_0_or_how_many_bits_it_has_is_believed():
    inverted = file_bytes(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(as_mode(decoded(inverted), "L")), 255 - (RAMP >> 8))
    twelve = file_bytes(Image.fromarray(RAMP.reshape(4, 16)), "TIFF")
    packed = b"".join(((int(a) >> 4) << 12 | int(b) >> 4).to_bytes(3, "big") for a, b in RAMP.reshape(-1, 2))
    with Image.open(io.BytesIO(twelve)) as image:
        (start,) = image.tag_v2[273]
    entry = twelve.index(b"\x02\x01\x03\x00\x01\x00\x00\x00")  # BitsPerSample, one short
    changed = twelve[: entry + 8] + (12).to_bytes(2, "little") + twelve[entry + 10 : start] + packed
    assert np.array_equal(np.asarray(as_mode(decoded(changed), "L")).ravel(), (RAMP >> 8).ravel())


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[0, 1.4]]),
        np.float32([[0, 4095]]),
        np.float32([[-1, 1]]),
        np.float32([[0, np.nan]]),
        np.int32([[-5, 200]]),
        np.int32([[0, 1023]]),
        np.int32([[0, 100_000]]),
    ],
    ids=str,
)
def test_deep_grey_of_which_white_is_not_known_is_refused_by_name_and_never_black(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(CorruptFileError, match=r"odd.tif holds .* Save it as an image of 8 bits"):
        decoded(tmp_path / "odd.tif")
    with Image.open(tmp_path / "odd.tif") as image, pytest.raises(CorruptFileError, match="odd.tif holds"):
        as_mode(image, "RGB")


def test_a_file_of_16_bits_that_is_almost_black_is_read_as_it_says_and_told(caplog):
    with caplog.at_level("WARNING"):
        grey = decoded(file_bytes(Image.fromarray(RAMP >> 8)), "night.png")
    assert np.asarray(grey).max() == 0 and "night.png is almost black: its largest value is 252 of 65535" in caplog.text


def test_a_grey_of_16_bits_that_is_transparent_becomes_white():
    image = decoded(file_bytes(Image.fromarray(RAMP), transparency=int(RAMP[0, 1])))
    expected = np.where(RAMP == RAMP[0, 1], 255, RAMP >> 8)
    assert np.array_equal(np.asarray(as_mode(image, "L")), expected)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(CorruptFileError, match="0 x 5 pixels"):
        as_mode(Image.new("RGB", (0, 5)), "RGB")


def test_an_image_is_turned_as_its_exif_says_and_read_on_where_that_is_broken():
    exif = Image.Exif()
    exif[274] = 6  # rotated by a quarter
    raw = file_bytes(picture(9, 5), "WEBP", exif=exif.tobytes(), lossless=True)
    assert as_mode(decoded(raw), "RGB").size == (5, 9)
    place = raw.index(b"MM\x00*")
    broken = raw[:place] + b"MM\xd2*" + raw[place + 4 :]
    assert as_mode(decoded(broken), "RGB").size == (9, 5)


@pytest.mark.parametrize("mode", ["1", "P", "PA", "LA", "La", "RGBa", "CMYK", "HSV", "YCbCr", "LAB", "F", "I", "I;16"])
def test_every_mode_becomes_rgb(mode):
    by_way_of = {"F": "L", "I": "L", "I;16": "L", "PA": "P", "La": "LA", "RGBa": "RGBA"}
    image = picture(6, 6).convert(by_way_of.get(mode, "RGB"))
    image = image.convert(mode) if mode != "LAB" else Image.new("LAB", (6, 6))
    assert as_mode(image, "RGB").mode == "RGB"


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match="40000 x 1 pixels would be resized to 8960000 x 224"):
        ImageInput(crop_share=1.0).pixels(Image.new("L", (40_000, 1)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_start_of_an_image_is_named_as_damaged(tmp_path, kind):
    raw = file_bytes(picture(40, 40), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(raw[: len(raw) // 2])
    for image in (str(path), path, {"bytes": path.read_bytes(), "path": "cut.jpg"}, {"bytes": None, "path": str(path)}):
        with pytest.raises(CorruptFileError, match="cut.jpg is no whole image"):
            decoded(image)
    with pytest.raises(CorruptFileError, match="row 7 is no whole image"):
        decoded(path.read_bytes(), "row 7")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_damaged_bytes_raise_one_error_or_none(kind):
    raw, random = file_bytes(picture(12, 9), kind), np.random.default_rng(3)
    outcomes = set()
    for _ in range(60):
        data = bytearray(raw)
        for place in random.integers(0, min(len(data), 120), size=4):
            data[place] = random.integers(0, 256)
        try:
            outcomes.add(as_mode(decoded(bytes(data)), "RGB").mode)
        except CorruptFileError:
            outcomes.add("corrupt")
    assert "corrupt" in outcomes


def test_a_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptFileError, match="decompression bomb"):
        decoded(file_bytes(picture(13, 9)))


def test_a_missing_file_and_a_row_without_image_are_named_for_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        decoded(tmp_path / "none.png")
    for image in ({"bytes": None, "path": None}, {}, 3):
        with pytest.raises(TypeError, match="An image is a PIL image"):
            decoded(image)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (0, 4)}, r"height and a width in pixels, but got \(0, 4\)"),
        ({"size": 224}, r"got \(224,\)"),
        ({"size": (2.5, 4)}, "in pixels"),
        ({"mean": (0.5, 0.5)}, "one or three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"std": (0.5, float("nan"), 0.5)}, "std above 0"),
        ({"mean": (0.5,), "std": (0.5,), "bgr": True}, "three channels round, but mean has 1"),
        ({"crop_share": 0.0}, "crop_share is a share"),
        ({"crop_share": 1.1}, "but got 1.1"),
        ({"interpolation": "area"}, "but got 'area'"),
    ],
)
def test_values_that_read_no_image_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ImageInput(**options)


def test_it_comes_back_from_json():
    reading = ImageInput((8, 12), (0.5,), (0.25,), 0.9, "bicubic", True)
    assert ImageInput(**json.loads(json.dumps(reading.to_dict()))) == reading
    turned = ImageInput((8, 12), bgr=True)
    assert ImageInput(**json.loads(json.dumps(turned.to_dict()))) == turned


def test_a_model_that_takes_red_first_is_described_as_it_was_before_the_order_was_known():
    assert set(ImageInput().to_dict()) == {"size", "mean", "std", "crop_share", "interpolation", "squash"}


def test_padding_of_timm_is_refused():
    with pytest.raises(ValueError, match="got 'border'"):
        ImageInput.of_config({"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_mode": "border"})


# What the image processors of transformers write, and what they mean.
PROCESSORS = {
    "vit": (
        {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ImageInput((32, 32), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", True),
    ),
    "vit of old": (
        {"size": 32, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ImageInput((32, 32), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", True),
    ),
    "convnext, small": (
        {
            "size": {"shortest_edge": 28},
            "crop_pct": 0.875,
            "resample": 3,
            "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3,
        },
        ImageInput((28, 28), (0.4,) * 3, (0.2,) * 3, 0.875, "bicubic"),
    ),
    "convnext, large": (
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3, "do_normalize": False},
        ImageInput((384, 384), (0.0,) * 3, (1.0,) * 3, 1.0, "bicubic", True),
    ),
    "mobilenet": (
        {
            "size": {"shortest_edge": 36},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ImageInput((32, 32), (0.5,) * 3, (0.5,) * 3, 32 / 36, "bilinear"),
    ),
    "tf": (
        {
            "size": {"height": 32, "width": 32},
            "resample": 0,
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "do_normalize": False,
        },
        ImageInput((32, 32), (0.5,) * 3, (0.5,) * 3, 1.0, "nearest", True),
    ),
    "efficientnet": (
        {
            "size": {"height": 32, "width": 32},
            "resample": 0,
            "include_top": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        ImageInput((32, 32), (0.5,) * 3, (0.25,) * 3, 1.0, "nearest", True),
    ),
}


def named_model(folder):
    model = tiny.vit()
    model.config._name_or_path = str(folder)
    model.name_or_path = str(folder)
    return model


@pytest.mark.parametrize("kind", PROCESSORS)
def test_an_image_processor_of_transformers_is_read_from_its_file(tmp_path, kind):
    values, expected = PROCESSORS[kind]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert image_input_of(named_model(tmp_path)) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {}),
        ("ConvNextImageProcessor", {}),
        ("MobileNetV2ImageProcessor", {}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),  # blue first, not normalised; by default it pads
    ],
)
def test_a_square_image_becomes_what_the_image_processor_itself_makes_of_it(tmp_path, kind, options):
    import transformers

    make = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)  # PIL's, of both generations
    processor = make(**options)
    processor.save_pretrained(tmp_path)
    reading = image_input_of(named_model(tmp_path))
    image = picture(301, 301)
    ours, theirs = reading.normalised(reading.pixels(image)), np.array(processor(image)["pixel_values"][0])
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, torch.tensor(theirs), atol=1e-5)


def test_a_share_finds_the_size_before_the_crop_again(tmp_path):
    for inner in range(1, 62):
        values = {**PROCESSORS["mobilenet"][0], "size": {"shortest_edge": 61}, "crop_size": inner}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        reading = image_input_of(named_model(tmp_path))
        assert reading.size == (inner, inner)
        assert reading._resized(100, 100) == (61, 61)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 36, "do_center_crop": True, "crop_size": 32, "resample": 2}, "size 36 with a crop"),
        ({"size": {"longest_edge": 36}, "resample": 2}, "its size is"),
        ({"size": {"shortest_edge": 36}, "resample": 2}, "crops nothing"),
        ({"size": {"height": 8, "width": 8}}, "lacks 'resample'"),
        ({"size": {"height": 8, "width": 8}, "resample": 4}, "resample is 4"),
        ({"size": {"height": 8, "width": 8}, "resample": 2}, "lacks 'image_mean'"),
        ({"size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": False}, r"scale bytes to \[0, 1\]"),
        (
            {"size": {"height": 8, "width": 8}, "resample": 2, "rescale_factor": 1, "do_normalize": False},
            "scales bytes by 1",
        ),
        (
            {"size": {"height": 8, "width": 8}, "do_center_crop": True, "crop_size": {"height": 4, "width": 2}},
            "another share of each side",
        ),
    ],
)
def test_what_an_image_processor_leaves_unclear_is_asked_for(tmp_path, values, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=f"(?s){words}.*ImageInput\\("):
        image_input_of(named_model(tmp_path))


def test_a_broken_file_of_an_image_processor_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(CorruptFileError, match="preprocessor_config.json"):
            image_input_of(named_model(tmp_path))


def test_models_that_say_nothing_about_their_images_ask_for_it(tmp_path):
    unnamed = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    )
    for model in (
        tiny.ConvNet(),
        unnamed,
        named_model(tmp_path),
        named_model("owner/never-seen"),
        named_model("/gone/x"),
    ):
        with pytest.raises(
            UnsupportedModelError, match=r"Put a preprocessor_config.json beside the weights .*pass ImageInput\("
        ):
            image_input_of(model)
    with pytest.raises(UnsupportedModelError, match="plain module"):
        image_input_of(nn.Linear(2, 2))


@pytest.mark.timm
def test_a_model_of_timm_gives_its_own_preprocessing_bare_or_wrapped(tmp_path):
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    from remos_hf.adapters.timm_models import ImageClassifier

    body = timm.create_model("test_vit", num_classes=3)
    body.pretrained_cfg.update(input_size=(3, 40, 48), crop_pct=0.8, interpolation="bicubic", mean=(0.1,) * 3)
    expected = ImageInput((40, 48), (0.1,) * 3, (0.5,) * 3, 0.8, "bicubic")
    assert image_input_of(body) == expected
    assert image_input_of(ImageClassifier(body)) == expected
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    wrapper = TimmWrapperForImageClassification(config)
    assert image_input_of(wrapper).size == (160, 160)  # test_resnet's own
    config.pretrained_cfg = {**body.pretrained_cfg, "crop_mode": "squash"}  # the checkpoint's
    assert image_input_of(wrapper) == ImageInput((40, 48), (0.1,) * 3, (0.5,) * 3, 0.8, "bicubic", True)


@pytest.mark.timm
def test_a_model_of_timm_that_cannot_say_it_asks_for_it():
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    with pytest.raises(UnsupportedModelError, match="built by its class"):
        image_input_of(ResNet(BasicBlock, [1, 1, 1, 1], channels=(4, 4, 4, 4)))
    with pytest.raises(UnsupportedModelError, match="takes 4 channels, but its mean has 3"):
        image_input_of(timm.create_model("test_resnet", in_chans=4))
