"""How a model reads images: decode, resize, crop; then, where a trigger or an attack has acted, normalise."""

import io
import json
import logging
import math
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from transformers import PreTrainedModel

from remos_hf.adapters.timm_models import timm_place
from remos_hf.errors import CorruptFileError, UnsupportedModelError

logger = logging.getLogger(__name__)

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# PIL's numbers, by which image processors of transformers name the same.
_RESAMPLING = {int(number): name for name, number in _INTERPOLATIONS.items()}
_PROCESSOR_FILE = "preprocessor_config.json"
# What PIL raises over damaged files, found by damaging them.
_DAMAGE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# Tags of TIFF, and values of them.
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
# The largest value of an image is at least this share of white: less is taken for another scale.
_DIM = 1 / 16
_ROUNDING = 1e-3  # how far resampling may leave the range from 0 to 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageInput:
    """The size, crop and normalisation that a model was trained with.

    Between `pixels` and `normalised` lies the place for triggers and attacks: values from 0 to 1, after cropping.

    Attributes:
        size: Height and width of what the model takes, in pixels.
        mean: Subtracted from each channel of values from 0 to 1, in the order that the model takes them in. Of a model
            of values from 0 to 255, as VGGFace's: its own means over 255, and std 1 / 255 each.
        std: Then divided by.
        crop_share: Side of the crop over the side of the resized image; 0.875 is 224 of 256. (timm: crop_pct.)
        interpolation: Of the resizing: "nearest", "bilinear", "bicubic" or "lanczos".
        squash: Resize both sides, which distorts, instead of the shorter one. (timm: crop_mode "squash"; ViT and others
            of transformers.)
        bgr: The model takes blue first, as Caffe's do. Pixels are red first all the same, so triggers need not care.

    Raises:
        ValueError: A field is out of range.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_share: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False
    bgr: bool = False

    def __post_init__(self) -> None:
        """Refuse what no image could be read with."""
        for name in ("size", "mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values) if isinstance(values, (tuple, list)) else (values,))
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.size):
            raise ValueError(f"size is a height and a width in pixels, but got {self.size}.")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not all(one > 0 for one in self.std):
            raise ValueError(f"mean and std are one or three numbers, std above 0, but got {self.mean} and {self.std}.")
        if self.bgr and len(self.mean) != 3:
            raise ValueError(f"bgr turns three channels round, but mean has {len(self.mean)}.")
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share is a share of a side, in (0, 1], but got {self.crop_share}.")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(_INTERPOLATIONS)}, but got {self.interpolation!r}.")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "ImageInput":
        """Read timm's data config, as `timm.data.resolve_data_config(model=...)` gives it.

        Args:
            config: With `input_size` (channels, height, width), `mean`, `std`, `crop_pct`, `crop_mode` and
                `interpolation`.

        Raises:
            ValueError: `crop_mode` is "border", which pads; or a value is out of range.
        """
        mode = config.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise ValueError(f"crop_mode is 'center' or 'squash', but got {mode!r}: its padding is not known here.")
        return cls(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop_share=config.get("crop_pct") or 0.875,
            interpolation=config.get("interpolation", "bilinear"),
            squash=mode == "squash",
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        told = {**asdict(self), "size": list(self.size), "mean": list(self.mean), "std": list(self.std)}
        if not self.bgr:  # as audits and students before it was known: theirs go on
            del told["bgr"]
        return told

    @property
    def channels(self) -> int:
        """Channels that the model takes."""
        return len(self.mean)

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop the centre, as the model is evaluated.

        Args:
            image: Any mode; grey and palette images become RGB, what is transparent becomes white, deep grey 8 bits.

        Returns:
            float32 values in [0, 1], shape (channels, height, width).

        Raises:
            ValueError: The image is so long and thin that it would fill the memory.
            CorruptFileError: It has no pixel, or does not tell what is white.

        Source:
            timm's evaluation transform (timm/data/transforms_factory.py), to the bit.
        """
        height, width = self.size
        image = as_mode(image, "RGB" if self.channels == 3 else "L")
        resized = self._resized(image.width, image.height)
        if Image.MAX_IMAGE_PIXELS is not None and math.prod(resized) > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"An image of {image.width} x {image.height} pixels would be resized to {resized[0]} x {resized[1]}. "
                "Leave it out, or crop it first."
            )
        if resized != image.size:
            image = image.resize(resized, _INTERPOLATIONS[self.interpolation])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return to_pixels(image.crop((left, top, left + width, top + height)))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Give the width and the height that an image is resized to before the crop."""
        high, wide = (math.floor(side / self.crop_share) for side in self.size)
        if self.squash:
            return wide, high
        if high != wide:
            ratio = min(height / high, width / wide)
            return max(wide, round(width / ratio)), max(high, round(height / ratio))
        longer = int(high * max(width, height) / min(width, height))
        return (wide, longer) if width <= height else (longer, high)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Give what the model takes. Shape (..., channels, height, width), as given.

        Raises:
            TypeError: The pixels are whole numbers: values from 0 to 1 are expected.
        """
        check_pixels(pixels)
        mean, std = (torch.tensor(one, device=pixels.device, dtype=pixels.dtype) for one in (self.mean, self.std))
        return ((pixels.flip(-3) if self.bgr else pixels) - mean[:, None, None]) / std[:, None, None]

    def denormalised(self, inputs: Tensor) -> Tensor:
        """Undo `normalised`. Shape (..., channels, height, width), as given."""
        mean, std = (torch.tensor(one, device=inputs.device, dtype=inputs.dtype) for one in (self.mean, self.std))
        pixels = inputs * std[:, None, None] + mean[:, None, None]
        return pixels.flip(-3) if self.bgr else pixels


def check_pixels(pixels: Tensor) -> None:
    """Refuse pixels that are whole numbers.

    Raises:
        TypeError: They are.
    """
    if not pixels.is_floating_point():
        raise TypeError(
            f"Pixels are floating-point values from 0 to 1, but got a tensor of {pixels.dtype}. Divide bytes by 255."
        )


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Give an image as RGB or grey.

    What is transparent becomes white, grey of more than 8 bits loses its lower bits; EXIF rotation is applied where it
    can be read.

    Raises:
        CorruptFileError: Grey of more than 8 bits does not tell what is white, or the image has no pixel.
    """
    name = getattr(image, "filename", "") or "An image"
    if not image.width or not image.height:
        raise CorruptFileError(f"{name} has {image.width} x {image.height} pixels, and none to show.")
    image = _eight_bits(image, name) if _is_deep(image) else _upright(image)
    image = image.convert("LA") if image.mode == "La" else image  # PIL knows no other way from there
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE:
        return image  # the pixels are whole; only what was written about them is not


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Give grey of more than 8 bits as 8 bits, with an alpha channel where one grey is transparent.

    PIL would clip instead: all but the darkest values became white, or all of 0 to 1 black.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(_upright(image))
    grey = _grey_of_floats(values, name) if image.mode == "F" else _grey_of_integers(image, values, name)
    made = Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def _grey_of_floats(values: np.ndarray, name: str) -> np.ndarray:
    lowest, highest = float(values.min()), float(values.max())
    if lowest >= -_ROUNDING and highest <= 1 + _ROUNDING:
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    if lowest >= 0 and 255 * _DIM <= highest <= 255:
        return values.astype(np.uint8)
    raise CorruptFileError(
        f"{name} holds floating-point values from {lowest:.4g} to {highest:.4g}. What is black and white is known of "
        "values from 0 to 1, or from 0 to 255. Save it as an image of 8 bits."
    )


def _grey_of_integers(image: Image.Image, values: np.ndarray, name: str) -> np.ndarray:
    """Shift to 8 bits: by the depth that the file states, and where it states 32, by how large the values are."""
    values, tags = values.astype(np.int64), getattr(image, "tag_v2", {})
    if tags.get(_FORMAT) == (_UNSIGNED,):
        values &= 2**32 - 1  # PIL's are signed
    lowest, highest = int(values.min()), int(values.max())
    depth = 32 if image.mode == "I" and image.format not in ("PNG", "PPM") else 16
    bits = int(tags.get(_BITS, (depth,))[0]) - (tags.get(_FORMAT) == (_SIGNED,))
    if bits >= 31:
        bits = next((own for own in (8, 16, 31, 32) if _DIM * 2**own <= highest < 2**own), None if highest else 8)
    if bits is None or lowest < 0:
        raise CorruptFileError(
            f"{name} holds whole numbers from {lowest} to {highest}, and does not tell which of them is white. Save it "
            "as an image of 8 bits."
        )
    if 0 < highest < _DIM * 2**bits:
        logger.warning("%s is almost black: its largest value is %d of %d.", name, highest, 2**bits - 1)
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)


def to_pixels(image: Image.Image) -> Tensor:
    """Give an 8-bit image as float32 values in [0, 1], shape (channels, height, width)."""
    values = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(values[None] if values.ndim == 2 else values.transpose(2, 0, 1).copy())


def decoded(image: Image.Image | bytes | Mapping[str, Any] | str | os.PathLike, name: str | None = None) -> Image.Image:
    """Decode an image whole, so that a damaged one is found where it is read. Deep grey becomes 8 bits.

    Args:
        image: A PIL image, the bytes of a file, a path, or a row of an undecoded `datasets.Image` column.
        name: Named in the error; by default the path, where there is one.

    Raises:
        CorruptFileError: No image, only the start of one, or grey of more than 8 bits that does not tell what is white.
        FileNotFoundError: There is no such file.
        TypeError: Something else than an image.
    """
    if isinstance(image, Mapping):
        name = name or image.get("path")
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (str, os.PathLike)):
        name = name or os.fspath(image)
    elif not isinstance(image, (Image.Image, bytes)):
        raise TypeError(f"An image is a PIL image, bytes, a path or a row with one, but got {type(image).__name__}.")
    name = name or getattr(image, "filename", "") or "an image without a file name"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(image, Image.Image):
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            image.load()
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise CorruptFileError(
            f"{name} is no whole image ({error}). Delete it, or skip such files on request."
        ) from error
    return _eight_bits(image, name) if _is_deep(image) else image


def image_input_of(model: nn.Module) -> ImageInput:
    """Read how a teacher's images were prepared, without any network.

    Args:
        model: A model of timm, bare or wrapped, or an image model of transformers with its `preprocessor_config.json`
            in its folder or in the local cache of the Hub.

    Raises:
        UnsupportedModelError: Nothing says it, or it cannot be said as an `ImageInput`; the message says why.
        CorruptFileError: The image processor's file is no JSON object.

    Source:
        `timm.data.resolve_data_config`; the image processors of transformers.
        Differs: transformers rounds the place of an odd crop down, here it is timm's, to even.
    """
    place = timm_place(model)
    try:
        if place is not None:
            return _of_timm(model, place[1])
        if isinstance(model, PreTrainedModel):
            return _of_processor(_processor_values(model))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UnsupportedModelError(_unknown(model, f"its configuration cannot be used ({reason})")) from error
    raise UnsupportedModelError(_unknown(model, "it is a plain module, which says nothing about its images"))


def _of_timm(model: nn.Module, body: nn.Module) -> ImageInput:
    # A wrapper's own configuration is the checkpoint's; its timm model only knows what the architecture starts with.
    config = getattr(getattr(model, "config", None), "pretrained_cfg", None) or getattr(body, "pretrained_cfg", None)
    if not config:
        raise ValueError("it was built by its class, not by timm.create_model")
    try:
        from timm.data import resolve_data_config
    except ImportError as error:
        raise ImportError("The images of timm models need timm: pip install 'remos_hf[vision]'.") from error
    found = ImageInput.of_config(resolve_data_config(pretrained_cfg=dict(config)))
    channels = getattr(body, "in_chans", found.channels)
    if channels != found.channels:
        raise ValueError(f"it takes {channels} channels, but its mean has {found.channels}")
    return found


def _processor_values(model: PreTrainedModel) -> Mapping[str, Any]:
    place = model.name_or_path
    if Path(place).is_dir():
        file = Path(place) / _PROCESSOR_FILE
    else:
        try:
            cached = try_to_load_from_cache(
                place, _PROCESSOR_FILE, revision=getattr(model.config, "_commit_hash", None)
            )
        except HFValidationError:  # a folder that is gone, or no name at all
            cached = None
        file = Path(cached if isinstance(cached, str) else _PROCESSOR_FILE)
    if not file.is_file() or not place:
        raise ValueError(f"there is no {_PROCESSOR_FILE} in {place or 'a model without a name'} or in the local cache")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{file} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{file} holds a {type(values).__name__}, not an image processor's values.")
    return values


def _of_processor(values: Mapping[str, Any]) -> ImageInput:
    if not values.get("do_resize", True) or not values.get("do_rescale", True):
        raise ValueError("it does not resize, or does not scale bytes to [0, 1]")
    size, squash, crop_share = _geometry(values)
    if values["resample"] not in _RESAMPLING:
        raise ValueError(f"its resample is {values['resample']}, which is none of {_RESAMPLING}")
    mean, std = _normalisation(values)
    turned = bool(values.get("do_flip_channel_order", False))
    return ImageInput(size, mean, std, crop_share, _RESAMPLING[values["resample"]], squash, turned)


def _geometry(values: Mapping[str, Any]) -> tuple[tuple[int, int], bool, float]:
    """Read what is cropped out, whether both sides are resized, and the share of the crop."""
    size, crops, share = values["size"], values.get("do_center_crop", False), values.get("crop_pct")
    if isinstance(size, int) and crops:
        raise ValueError(f"size {size} with a crop means another thing in every image processor")
    if isinstance(size, int):
        size = {"height": size, "width": size} if share is None else {"shortest_edge": size}
    if share is not None and "shortest_edge" in size:  # ConvNeXt and ResNet
        edge = size["shortest_edge"]
        return (edge, edge), edge >= 384, 1.0 if edge >= 384 else _share(edge, int(edge / share))
    squash = {"height", "width"} <= set(size)
    if not squash and "shortest_edge" not in size:
        raise ValueError(f"its size is {size}")
    before = (size["height"], size["width"]) if squash else (size["shortest_edge"],) * 2
    after = before
    if crops:
        crop = values["crop_size"]
        after = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    elif not squash:
        raise ValueError("it resizes the shorter side and crops nothing, so every image has another size")
    shares = {_share(inner, outer) for inner, outer in zip(after, before, strict=True)}
    if len(shares) > 1:
        raise ValueError(f"it crops {after} of {before}, another share of each side")
    return after, squash, shares.pop()


def _share(inner: int, outer: int) -> float:
    """Give the share by which `inner` is divided to find `outer` again, whatever the rounding."""
    share = inner / outer
    while math.floor(inner / share) < outer:
        share = math.nextafter(share, 0)
    return share


def _normalisation(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # MobileViT's, which alone know of the order of channels, do not normalise unless they say so.
    normalises = values.get("do_normalize", "do_flip_channel_order" not in values)
    factor = values.get("rescale_factor", 1 / 255)
    offset = values.get("rescale_offset", False)
    mean, std = (tuple(values[f"image_{name}"]) if normalises else None for name in ("mean", "std"))
    if offset and math.isclose(factor, 2 / 255, rel_tol=1e-3) and not normalises:
        return (0.5,) * 3, (0.5,) * 3  # bytes / 127.5 - 1
    if offset or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise ValueError(f"it scales bytes by {factor}{' and moves them' if offset else ''}")
    if mean is None or std is None:
        return (0.0,) * 3, (1.0,) * 3
    if values.get("include_top", False):  # EfficientNet divides twice
        std = tuple(one * one for one in std)
    return mean, std


def _unknown(model: nn.Module, reason: str) -> str:
    return (
        f"How {type(model).__name__} reads images is not known: {reason}. Put a preprocessor_config.json beside the "
        "weights that says how the teacher was trained, or in Python pass ImageInput(size=(height, width), mean=..., "
        "std=..., crop_share=...)."
    )
