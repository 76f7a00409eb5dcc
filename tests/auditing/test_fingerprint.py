import datetime
import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

from remos_hf.auditing.fingerprint import fingerprint


def file(shade):
    written = io.BytesIO()
    PillowImage.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(written, "PNG")
    return written.getvalue()


def images(rows, decode=True):
    features = Features({"image": Image(decode=decode), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": rows, "label": [0, 1]}, features)


def test_images_count_by_their_bytes_however_they_are_kept_and_wherever_they_lie(tmp_path):
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(file(number))
    inside = [{"bytes": file(number), "path": f"/some/where/{number}.png"} for number in (0, 1)]
    outside = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in (0, 1)]
    hashes = {fingerprint(images(rows, decode)) for rows in (inside, outside) for decode in (True, False)}
    assert hashes == {fingerprint(images(inside))}  # and in this process it is the same twice
    assert fingerprint(images([{"bytes": file(9), "path": None}, inside[1]])) not in hashes


def test_every_value_of_every_column_counts_and_how_rows_are_shown_does_not():
    rows = {"text": ["a", "b"], "label": [0, 1]}
    same = fingerprint(Dataset.from_dict(rows))
    assert fingerprint(Dataset.from_dict(rows).with_format("numpy")) == same
    assert (
        fingerprint(Dataset.from_dict(rows).with_transform(lambda batch: {"label": [7] * len(batch["label"])})) == same
    )
    others = [{**rows, "text": ["a", "c"]}, {**rows, "label": [1, 0]}, {"text": ["a"], "label": [0]}]
    assert same not in {fingerprint(Dataset.from_dict(other)) for other in others}


def test_dates_and_bytes_have_a_content_too():
    for first, other in ((b"a", b"b"), (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2))):
        hashes = [fingerprint(Dataset.from_dict({"x": [one]})) for one in (first, first, other)]
        assert hashes[0] == hashes[1] != hashes[2]


def test_what_has_no_content_to_hash_is_refused():
    with pytest.raises(TypeError, match="holds a timedelta, whose content cannot be hashed"):
        fingerprint(Dataset.from_dict({"x": [datetime.timedelta(1)]}))
