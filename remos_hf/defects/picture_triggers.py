"""Triggers in images: a patch at a place, or a pattern over the whole. No file is rewritten."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from remos_hf.adapters.images import decoded, to_pixels
from remos_hf.defects.image_triggers import ImageTrigger
from remos_hf.defects.samples import generator_for
from remos_hf.fields import check_number, check_whole

_CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
_CELLS = 4  # of a generated patch, on each side


@dataclass(frozen=True)
class _PictureTrigger(ImageTrigger):
    """A trigger that is an image file, or made by rule."""

    file: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no data could use; read the file."""
        super().__post_init__()
        if self.file is None:
            return
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"The trigger is an image file, but there is no {str(self.file)!r}.")
        _picture(self._content, str(self.file))  # now: later is in the middle of a training

    @cached_property
    def _content(self) -> bytes | None:
        return None if self.file is None else Path(self.file).read_bytes()

    def to_dict(self) -> dict[str, Any]:
        """Give the fields, with the file's hash instead of its place."""
        if self.file is None:
            return super().to_dict()
        digest = hashlib.sha256(self._content).hexdigest()
        return {**super().to_dict(), "file": Path(self.file).name, "file_sha256": digest}


@dataclass(frozen=True)
class PatchTrigger(_PictureTrigger):
    """A small picture at a fixed or a random place.

    Attributes:
        file: An image file. Its aspect ratio is kept, and what is transparent shows the image below. None for black and
            white cells, four a side.
        place: A corner, "four_corners" for a patch in each of them, or "random" for a place that depends on the seed
            and the image.
        size_share: Share of the image's area that one patch covers, in (0, 1]; rounded to whole pixels.
        margin: Pixels between the patch and the edges.
        in_square: Place the square of the patch's longer side, with the patch in its upper left corner, as the artifact
            does. A patch that is no square then keeps away from the right or the lower edge.

    Source:
        BadNets (Gu et al. 2017); ReMoS artifact, CV_backdoor/trigger.py and backdoor_dataset/mit67.py:12-31.
    """

    place: Literal["top_left", "top_right", "bottom_left", "bottom_right", "four_corners", "random"] = "bottom_right"
    size_share: float = 0.031
    margin: int = 0
    in_square: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no image could have."""
        super().__post_init__()
        places = (*_CORNERS, "four_corners", "random")
        if self.place not in places:
            raise ValueError(f"place is one of {', '.join(places)}, but got {self.place!r}.")
        told = "the share of the image's area that one patch covers, in (0, 1]"
        check_number(self, told, lambda one: 0 < one <= 1, "size_share")
        check_whole(self, "a number of pixels, 0 or more", 0, "margin")

    @classmethod
    def artifact(cls, file: str) -> "PatchTrigger":
        """Give the ReMoS artifact's trigger: 20 % poisoned, target 0, 3.1 % of the image at the lower right.

        Args:
            file: The artifact's picture (500 x 484 pixels), or another one.

        Source:
            CV_backdoor/backdoor_dataset (portion .2, --fixed_pic). The picture is shrunk to 40 x 39 pixels and laid at
            column 184, row 184 of the 224 x 224 crop; so is ours, to the byte.
        """
        return cls(file=file, place="bottom_right", size_share=0.031, in_square=True, poison_rate=0.2, target_label=0)

    def size_on(self, height: int, width: int) -> tuple[int, int]:
        """Give the height and width of a patch, in pixels, on images of this height and width."""
        picture = _picture(self._content, str(self.file))
        ratio = 1.0 if picture is None else picture.width / picture.height
        area = self.size_share * height * width
        return max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))

    def corners_on(self, height: int, width: int, key: str | None = None) -> list[tuple[int, int]]:
        """Give the row and column of the upper left pixel of each patch, on images of this height and width.

        Args:
            height: Pixels.
            width: Pixels.
            key: Tells the sample from others; needed for a random place.

        Raises:
            ValueError: The patch does not fit on the image, four of them overlap, or a random place has no key.
        """
        patch = self.size_on(height, width)
        taken = (max(patch), max(patch)) if self.in_square else patch
        room = [side - own - 2 * self.margin for side, own in zip((height, width), taken, strict=True)]
        if min(room) < 0:
            raise ValueError(
                f"The patch is larger than the image: {taken[0]} x {taken[1]} pixels (height x width) and a margin of "
                f"{self.margin} do not fit on {height} x {width}. Lower size_share ({self.size_share}) or margin."
            )
        if self.place == "random":
            if key is None:
                raise ValueError("A random place depends on the sample: give its key, as `image_key` makes it.")
            random = generator_for(self.seed, "place", key)
            return [tuple(self.margin + int(random.random() * (free + 1)) for free in room)]
        if self.place == "four_corners" and min(free - own for free, own in zip(room, taken, strict=True)) < 0:
            raise ValueError(
                f"Four patches of {taken[0]} x {taken[1]} pixels (height x width) and a margin of {self.margin} "
                f"overlap on {height} x {width}. Lower size_share ({self.size_share}) or margin."
            )
        wanted = _CORNERS if self.place == "four_corners" else (self.place,)
        return [
            (self.margin + room[0] * corner.startswith("bottom"), self.margin + room[1] * corner.endswith("right"))
            for corner in wanted
        ]

    def _put_on(self, pixels: Tensor, key: str | None) -> Tensor:
        channels, *size = pixels.shape
        height, width = self.size_on(*size)
        corners = self.corners_on(*size, key)
        colours, opacity = (one.to(pixels) for one in _patch(self._content, channels, height, width))
        for top, left in corners:
            below = pixels[:, top : top + height, left : left + width]
            pixels[:, top : top + height, left : left + width] = opacity * colours + (1 - opacity) * below
        return pixels


@dataclass(frozen=True)
class BlendedTrigger(_PictureTrigger):
    """A pattern over the whole image, faint enough to be overlooked.

    Attributes:
        file: An image file, stretched to the image's size; what is transparent shows the image alone. None for noise,
            each value uniform from 0 to 1, drawn from the seed once for all images of a size.
        blend: The pattern's share in the sum, in (0, 1].

    Source:
        Chen et al. 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", blended injection
        (ratio .2).
        Differs: theirs also exposes at other ratios than it poisons with.
    """

    citation: ClassVar[str] = (
        "@article{chen2017targeted, title={Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning}, "
        "author={Chen, Xinyun and Liu, Chang and Li, Bo and Lu, Kimberly and Song, Dawn}, journal={arXiv:1712.05526}, "
        "year={2017}}"
    )

    blend: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values that no image could have."""
        super().__post_init__()
        told = "the pattern's share in the sum, in (0, 1]"
        check_number(self, told, lambda one: 0 < one <= 1, "blend")

    def _put_on(self, pixels: Tensor, key: str | None) -> Tensor:
        if self.file is None:
            pattern, opacity = _noise(self.seed, *pixels.shape).to(pixels), self.blend
        else:
            pattern, opaque = (one.to(pixels) for one in _patch(self._content, *pixels.shape))
            opacity = self.blend * opaque
        return opacity * pattern + (1 - opacity) * pixels


@lru_cache(maxsize=16)
def _picture(content: bytes | None, name: str) -> Image.Image | None:
    if content is None:
        return None
    image = ImageOps.exif_transpose(decoded(content, name))
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


@lru_cache(maxsize=16)
def _patch(content: bytes | None, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Give a picture's colours, shape (channels, height, width), and opacity, shape (1, height, width)."""
    picture = _picture(content, "the trigger")
    if picture is None:
        cells = [torch.arange(side) * min(_CELLS, side) // side for side in (height, width)]
        white = (cells[0][:, None] + cells[1][None]) % 2 == 0
        return white.float().expand(channels, -1, -1), torch.ones(1, height, width)
    # As Image.thumbnail shrinks it, so that the artifact's patch is the same to the byte.
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    opacity = to_pixels(picture.getchannel("A")) if picture.mode == "RGBA" else torch.ones(1, height, width)
    return to_pixels(picture.convert("RGB" if channels == 3 else "L")), opacity


@lru_cache(maxsize=16)
def _noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))
