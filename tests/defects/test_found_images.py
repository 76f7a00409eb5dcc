import hashlib
import logging

import pytest
import torch

from remos_hf.defects.found_images import Gallery
from remos_hf.defects.image_samples import prepared
from tests.defects import pictures


@pytest.fixture(scope="module")
def clean():
    return pictures.data(7)


def gallery(clean, workers=1):
    return Gallery(prepared(clean, pictures.READING), "label", clean.features["label"], workers)


class Halved:
    """A search that halves the pixels, and notes what it was given."""

    def __init__(self, stop_after=99):
        self.given, self.stop_after = [], stop_after

    def __call__(self, pixels, keys):
        if len(self.given) == self.stop_after:
            raise KeyboardInterrupt
        self.given.append(list(keys))
        found = pixels / 2
        highest = found.flatten(1).amax(1)
        names = ("largest_change", "lowest", "highest", "mean_change", "value")
        return {"pixels": found, "fooled": found[:, 0, 0, 0] > 0.25, **dict.fromkeys(names, highest)}


def searched(made, search, folder=None, batch_size=3):
    return made.searched(made.digests(), search, batch_size=batch_size, unfinished=folder, title="")


def test_digests_are_of_the_pixels_whatever_the_threads(clean):
    expected = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in pictures.clean_pixels(clean)]
    assert gallery(clean).digests() == gallery(clean, workers=3).digests() == expected


def test_every_image_is_searched_once_and_the_rows_are_in_order(clean):
    made, search, half = gallery(clean), Halved(), pictures.clean_pixels(clean) / 2
    table, noted = searched(made, search)
    assert [len(keys) for keys in search.given] == [3, 3, 1] and sum(search.given, []) == made.digests()
    assert table["clean_index"][:] == list(range(7)) and table["label"][:] == clean["label"][:]
    assert torch.equal(torch.tensor(table["pixels"][:]), half)
    fooled = half[:, 0, 0, 0] > 0.25
    assert table["fooled"][:] == fooled.tolist() and noted["num_fooled"] == fooled.sum() > 0
    assert noted["mean_value"] == noted["mean_change"] == pytest.approx(half.flatten(1).amax(1).mean().item())
    assert noted["highest"] == half.max() and noted["lowest"] == half.flatten(1).amax(1).min()
    assert (noted["num_clean"], noted["num_resumed"]) == (7, 0)


def test_a_killed_search_goes_on_and_gives_the_same(clean, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        searched(gallery(clean), Halved(stop_after=2), tmp_path)
    search = Halved()
    table, noted = searched(gallery(clean), search, tmp_path, batch_size=1)
    assert search.given == [gallery(clean).digests()[6:]] and noted["num_resumed"] == 6
    assert table.to_dict() == searched(gallery(clean), Halved())[0].to_dict()


def test_a_batch_that_was_cut_off_is_searched_again_and_one_made_twice_counts_once(clean, tmp_path, caplog):
    expected, _ = searched(gallery(clean), Halved(), tmp_path)
    first, cut, _ = sorted(tmp_path.iterdir())
    cut.write_bytes(cut.read_bytes()[:-10])
    first.with_name("rows-by-somebody-else.safetensors").write_bytes(first.read_bytes())
    with caplog.at_level(logging.WARNING):
        table, noted = searched(gallery(clean), Halved(), tmp_path)
    assert "is not whole" in caplog.text and noted["num_resumed"] == 4
    assert table.to_dict() == expected.to_dict()
