"""A hash of a data set's contents that is the same in every run, on every machine."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PillowImage


def fingerprint(dataset: Dataset) -> str:
    """Hash the rows of a data set.

    An image counts by the bytes of its file, or by its pixels; where the file lies does not count.

    Args:
        dataset: The samples.

    Returns:
        sha256, in hex.

    Raises:
        TypeError: A value is neither JSON nor an image, so that nothing says what it holds.
    """
    digest = hashlib.sha256()
    plain = dataset.with_format(None)  # what augments while it reads gives other pixels each time
    for name, feature in plain.features.items():
        if isinstance(feature, Image):
            plain = plain.cast_column(name, Image(decode=False))
    for row in plain:
        told = {name: _file(value) for name, value in row.items()}
        digest.update(json.dumps(told, sort_keys=True, default=_content).encode())
    return digest.hexdigest()


def _file(value: Any) -> Any:  # noqa: ANN401 - of any column
    if not isinstance(value, dict) or set(value) != {"bytes", "path"}:
        return value
    return Path(value["path"]).read_bytes() if value["bytes"] is None and value["path"] else value["bytes"]


def _content(value: Any) -> Any:  # noqa: ANN401 - what JSON does not know
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, PillowImage.Image):
        return [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, (np.ndarray, np.generic)):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return hashlib.sha256(file.getvalue()).hexdigest()
    if hasattr(value, "isoformat"):  # dates and times
        return value.isoformat()
    raise TypeError(
        f"A sample holds a {type(value).__name__}, whose content cannot be hashed, so no audit of it can go on. Leave "
        "its column out."
    )
