"""What `remos explain` may be asked for, as `options.py` says it of the other commands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from remos_hf.cli.options import was_given

# What says something only of data that an input is compared with.
_OF_DATA = {
    "text_columns": "--text-column",
    "reference": "--reference",
    "max_samples": "--max-samples",
    "batch_size": "--batch-size",
    "seed": "--seed",
}


def _theta(text: str) -> float:
    """Read a share of a relative output."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise BadParameter(f"is a share of each sum, at least 0 and below 1, but got {text}.")
    return value


@dataclass(frozen=True)
class ExplainOptions:
    """Draw what a model says of one image or text back through its layers, to the pixels or tokens it came from.

    Traces contributions as NNSlicer does, compared with what the model usually reads, which --data shows. Writes
    explanation.json and explanation.html.
    """

    model: Annotated[
        str, Argument(metavar="MODEL", help="Folder or Hub id of a classifier of texts or images; images: timm/ID too.")
    ]
    given: Annotated[str, Argument(metavar="INPUT", help="An image file; or a text, in quotes.")]
    output: Annotated[Path, Option("--output", "-o", help="Folder for the result. It has to be new or empty.")]
    data: Annotated[
        str | None,
        Option(
            help="Ordinary samples to compare with, labels not needed, as other commands take them: a file of texts, a "
            "folder of images, a Hub data set. Without, everything is compared with zero."
        ),
    ] = None
    label: Annotated[
        str | None,
        Option(metavar="CLASS", help="The class asked about, or its number. Default: the one that the model says."),
    ] = None
    text_pair: Annotated[str | None, Option(metavar="TEXT", help="Of a model of pairs: the second text.")] = None
    theta: Annotated[
        float,
        Option(
            parser=_theta,
            metavar="SHARE",
            help="The smallest effects that together stay under this share of a sum are left out.",
        ),
    ] = 0.2
    reference: Annotated[
        Literal["global", "class", "position"],
        Option(help="The mean over --data: of each neuron; of those that the model says the same of; by position."),
    ] = "global"
    max_samples: Annotated[int, Option(min=1, help="Samples of --data to use, drawn by the seed.")] = 512
    text_columns: Annotated[
        list[str], Option("--text-column", help="Of --data: the text, or both texts of a pair.")
    ] = field(default_factory=list)
    max_length: Annotated[int, Option(min=4, help="Tokens kept of each text.")] = 128
    batch_size: Annotated[int, Option(min=1, help="Samples of a forward pass over --data.")] = 32
    seed: Annotated[int, Option(min=0, help="Decides which samples of --data are drawn.")] = 0
    cpu: Annotated[bool, Option("--cpu", help="Leave a GPU alone.")] = False
    overwrite: Annotated[
        bool,
        Option("--overwrite", help="Replace the files of an earlier result in --output; no other file is touched."),
    ] = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        for name, option in _OF_DATA.items():
            if self.data is None and was_given(self, name):
                raise BadParameter(f"{option} is about --data, which is not given: leave it out.")
