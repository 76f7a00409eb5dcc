"""An explanation as one HTML file that needs no network: the answer, the input, then layer by layer what flows."""

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from remos_hf.judging.explained import Explained, neuron_told, signed_told
from remos_hf.judging.words import name_told
from remos_hf.showing.page_parts import UNSAID
from remos_hf.showing.palette import BLUE, VERMILION
from remos_hf.showing.templates import environment
from remos_hf.slicing.explanation import Explanation, LayerFlow
from remos_hf.whole import replace_file

# Of a map: contributions from here on have the full colour, or a few pixels would leave the others white.
_FULL = 0.99
_PALE = 0.35  # of the image below the map, so that colours stand out
# An image with sides from here on is also drawn in so many cells a side: single pixels are too small to be seen.
_LARGE, _CELLS = 96, 14


def write_explanation_page(
    explanation: Explanation,
    said: Explained,
    path: str | os.PathLike,
    *,
    image: Tensor | None = None,
    tokens: Sequence[tuple[str, int]] = (),
    title: str = "What the model says of one input",
    command: str | None = None,
) -> Path:
    """Write an explanation as one HTML file.

    Args:
        explanation: As `explain` gives it.
        said: What it comes to, which the page says at its top.
        path: The HTML file. Written beside its place and renamed.
        image: Of an image, its pixels as the model reads them, from 0 to 1. Shape (channels, height, width).
        tokens: Of a text, each with its contribution.
        title: Of the page.
        command: That made the explanation.

    Returns:
        The HTML file.

    Raises:
        ValueError: No input of the explanation has the image's height and width.
    """
    path = Path(path)
    content = (
        environment()
        .get_template("explanation_page.jinja")
        .render(
            title=title,
            said=said,
            unsaid=UNSAID,
            figures=[] if image is None else _figures(explanation, image),
            tokens=_tokens(tokens),
            inputs=[_input(name, one) for name, one in explanation.inputs.items()],
            layers=[_layer(one) for one in explanation.layers],
            settings=json.dumps(_settings(explanation), indent=1, ensure_ascii=False),
            command=command,
        )
    )
    replace_file(path, content.encode())
    return path


def contribution_map(contributions: Tensor, image: Tensor) -> Image.Image:
    """Lay contributions over a pale grey image: blue where they are positive, orange where they are negative.

    Args:
        contributions: Shape (height, width).
        image: Pixels from 0 to 1, shape (channels, height, width).

    Returns:
        RGB, of the image's size.
    """
    size = contributions.double().numpy()
    strongest = np.quantile(np.abs(size[size != 0]), _FULL) if size.any() else 1.0
    share = np.clip(np.abs(size) / strongest, 0, 1)[..., None]
    grey = 1 - _PALE * (1 - image.double().mean(0).numpy()[..., None])
    colours = np.where(size[..., None] > 0, _rgb(BLUE), _rgb(VERMILION))
    return Image.fromarray((255 * (share * colours + (1 - share) * grey)).round().astype(np.uint8))


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])


def _figures(explanation: Explanation, image: Tensor) -> list[dict[str, Any]]:
    size = tuple(image.shape[1:])
    whole = next((one for one in explanation.inputs.values() if one.shape[-2:] == size and one.dim() > 1), None)
    if whole is None:
        shapes = {name: tuple(one.shape) for name, one in explanation.inputs.items()}
        raise ValueError(f"The image has {size[0]} x {size[1]} pixels, but what was explained has the shapes {shapes}.")
    found = whole.reshape(-1, *size).sum(0)
    maps = [(found, "Contributions of its pixels, all channels together", "a pixel")]
    if min(size) >= _LARGE:
        maps.append((_in_cells(found), f"The same, added up in {_CELLS} x {_CELLS} cells", "a cell"))
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    return [
        _figure(Image.fromarray(pixels), "As the model reads it.", "The image."),
        *(
            _figure(
                contribution_map(one, image),
                f"{what}: blue helped, orange worked against it; {signed_told(int(one.min()))} to "
                f"{signed_told(int(one.max()))} {of}.",
                f"A map over the image. The strongest contribution {of} is {int(one.abs().max()):,}.",
            )
            for one, what, of in maps
        ),
    ]


def _in_cells(found: Tensor) -> Tensor:
    """Give every pixel the sum of its cell."""
    place = [torch.arange(side) * _CELLS // side for side in found.shape]
    sums = torch.zeros(_CELLS, _CELLS, dtype=torch.int64)
    sums.index_put_((place[0][:, None], place[1][None, :]), found, accumulate=True)
    return sums[place[0]][:, place[1]]


def _figure(picture: Image.Image, caption: str, alt: str) -> dict[str, Any]:
    content = io.BytesIO()
    picture.save(content, "png")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"source": source, "width": picture.width, "height": picture.height, "caption": caption, "alt": alt}


def _tokens(tokens: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    most = max((abs(value) for _, value in tokens), default=0) or 1
    return [
        {"text": name_told(token), "sign": _sign(value), "share": abs(value) / most, "told": signed_told(value)}
        for token, value in tokens
    ]


def _sign(value: int) -> str:
    return "for" if value > 0 else "against" if value < 0 else "none"


def _input(name: str, found: Tensor) -> dict[str, str]:
    parts = [signed_told(int(found.clamp(**end).sum())) for end in ({"min": 0}, {"max": 0})]
    return {"name": name, "positive": parts[0], "negative": parts[1]}


def _layer(one: LayerFlow) -> dict[str, Any]:
    total = one.positive - one.negative or 1
    return {
        "name": one.name.removesuffix(".weight").split("."),
        "positive": signed_told(one.positive),
        "negative": signed_told(one.negative),
        "for": one.positive / total,
        "against": -one.negative / total,
        "reached": f"{one.reached:,} of {one.neurons:,} neurons",
        "reached_share": one.reached / one.neurons,
        "in_slice": f"{100 * one.in_slice / one.weights:.1f} % of {one.weights:,} weights",
        "in_slice_share": one.in_slice / one.weights,
        "strongest": [
            {"told": neuron_told(neuron), "sign": _sign(neuron.positive + neuron.negative)} for neuron in one.strongest
        ],
    }


def _settings(explanation: Explanation) -> dict[str, Any]:
    return {key: value for key, value in explanation.to_dict().items() if key not in ("layers", "inputs")}
