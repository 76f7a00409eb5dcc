import torch

from remos_hf.scanning.phrases import grow


class Counting:
    """A model whose margin is known: it counts how much of a wanted phrase stands in a row."""

    wanted = (7, 8, 9)

    def logits(self, ids):
        def held(row):
            return max(
                size
                for size in range(len(self.wanted) + 1)
                for start in range(len(self.wanted) - size + 1)
                for at in range(len(row) - size + 1)
                if tuple(row[at : at + size]) == self.wanted[start : start + size]
            )

        counts = torch.tensor([float(held(row)) for row in ids.tolist()])
        return torch.stack([torch.zeros(len(ids)), counts], 1)


class Host:
    label = 0

    def with_inserted(self, inserted):
        return inserted


def grown(**options):
    options = {"seeds": [8, 3], "vocabulary": range(12), "longest": 3, "beam": 2, **options}
    return grow(Counting(), {0: [Host()]}, 1, **options)


def test_a_phrase_is_grown_from_a_piece_in_its_middle():
    found = grown()
    assert found[0] == ((7, 8, 9), 3.0)
    assert all(len(phrase) > 1 for phrase, _ in found)


def test_what_adds_nothing_to_its_piece_is_left_out():
    assert grown(vocabulary=[3, 4]) == []


def test_no_phrase_is_longer_than_asked():
    assert {len(phrase) for phrase, _ in grown(longest=2)} == {2}
