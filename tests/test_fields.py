import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.fields import check_number, check_whole, is_number, plain


@dataclasses.dataclass(frozen=True)
class Recipe:
    share: object = 0.5
    count: object = 1

    def __post_init__(self):
        check_number(self, "a share, in [0, 1]", lambda one: 0 <= one <= 1, "share")
        check_whole(self, "a number of things, at least 1", 1, "count")


@given(st.floats(0, 1), st.integers(1, 2**40))
def test_a_number_that_fits_stays_the_very_one_and_numpys_become_plain(share, count):
    recipe = Recipe(share, count)
    assert recipe.share is share and recipe.count is count
    again = Recipe(np.float64(share), np.int64(count))
    assert again == recipe and (type(again.share), type(again.count)) == (float, int)
    assert Recipe(np.float32(share)).share == float(np.float32(share))


@pytest.mark.parametrize("value", [True, np.True_, "0.1", None, object(), (1,), float("nan"), float("inf"), 1j])
def test_what_is_no_number_in_range_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match=r"share is a share, in \[0, 1\], but got"):
        Recipe(share=value)
    with pytest.raises(ValueError, match="count is a number of things, at least 1, but got"):
        Recipe(count=value)


def test_a_whole_number_is_no_fraction_and_none_below_the_least():
    for value in (2.5, 2.0, 0, np.float32(2)):
        with pytest.raises(ValueError, match="count is a number of things"):
            Recipe(count=value)
    assert is_number(Fraction(1, 2)) and not is_number(True) and Recipe(Fraction(1, 2)).share == 0.5


def test_numbers_within_lists_and_mappings_become_plain_and_all_else_stays():
    made = plain({"one": np.float32(0.5), "some": [np.int64(2), (True, "a", None)], "none": {}})
    assert made == {"one": 0.5, "some": [2, (True, "a", None)], "none": {}}
    assert type(made["one"]) is float and type(made["some"][0]) is int and made["some"][1][0] is True
