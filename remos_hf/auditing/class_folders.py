"""A folder that holds a folder of images for each class."""

import warnings
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from remos_hf.auditing.labels import LABEL_COLUMN

IMAGE_COLUMN = "image"
IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# What macOS puts into archives, and Python beside programs, beside folders that start with a dot.
_NO_CLASSES = frozenset({"__MACOSX", "__pycache__"})
_TOLD = 5


def read_folder(folder: str | Path) -> Dataset:
    """Read a folder of images for each class. Files are kept as they are, and decoded where they are used.

    Hidden files and folders, what is no image, and folders inside of class folders are left out, with a warning.

    Returns:
        Columns `image` (bytes and path) and `label`, a ClassLabel; the classes are sorted by name. What was left out is
        in `info.description`, which is empty if nothing was.

    Raises:
        ValueError: There are fewer than two classes, or one without images.
    """
    folder = Path(folder)
    classes, left_out = class_folders(folder)
    if len(classes) < 2:
        raise ValueError(
            f"{folder} should hold a folder of images for each class, but holds {[place.name for place in classes]}."
        )
    rows, labels = [], []
    for label, place in enumerate(classes):
        entries = sorted(place.iterdir())
        files = [path for path in entries if is_image(path)]
        left_out += [f"{place.name}/{path.name}{'/' * path.is_dir()}" for path in entries if path not in set(files)]
        if not files:
            raise ValueError(_without_images(place, [path.name for path in entries if path.is_dir()]))
        rows += [{"bytes": path.read_bytes(), "path": f"{place.name}/{path.name}"} for path in files]
        labels += [label] * len(files)
    told = ""
    if left_out:
        more = f" and {len(left_out) - _TOLD} more" if len(left_out) > _TOLD else ""
        told = f"{len(left_out)} entries left out of the images in {folder.name}: {', '.join(left_out[:_TOLD])}{more}"
        warnings.warn(
            f"{told}. Images are files ({', '.join(sorted(IMAGES))}) that lie in the folder of their class itself. "
            "(remos_hf)",
            stacklevel=2,
        )
    features = Features(
        {IMAGE_COLUMN: Image(decode=False), LABEL_COLUMN: ClassLabel(names=[one.name for one in classes])}
    )
    found = Dataset.from_dict({IMAGE_COLUMN: rows, LABEL_COLUMN: labels}, features)
    found.info.description = told  # kept with the data, for those who report what was measured on
    return found


def class_folders(folder: Path) -> tuple[list[Path], list[str]]:
    """Give the folders of classes, sorted by name, and the names of folders that the machine left there."""
    places = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    odd = [path for path in places if path.name.startswith(".") or path.name in _NO_CLASSES]
    return [path for path in places if path not in odd], [f"{path.name}/" for path in odd]


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, and none that macOS left beside one."""
    return path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file()


def _without_images(place: Path, inside: list[str]) -> str:
    deeper = f" Are {place} and the folders beside it splits, not classes? Then name one of them." if inside else ""
    return f"The class folder {place} holds no image ({', '.join(sorted(IMAGES))}).{deeper}"
