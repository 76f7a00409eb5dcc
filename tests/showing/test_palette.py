import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors

from remos_hf.judging import kinds
from remos_hf.showing import palette
from remos_hf.showing.palette import kind_shown, looks_of

KNOWN = [*{one for one in vars(kinds).values() if isinstance(one, kinds.Kind)} - {kinds.UNKNOWN, kinds.MIXED}]


def test_the_palette_is_okabe_and_itos_and_each_color_reads_on_white():
    okabe_ito = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    assert set(palette.PALETTE) < set(okabe_ito) and len(set(palette.PALETTE)) == 7
    for color in palette.PALETTE:
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(color)]
        assert 1.05 / (np.dot(light, (0.2126, 0.7152, 0.0722)) + 0.05) > 2


def test_every_kind_that_has_a_word_has_a_look_of_its_own():
    looks = looks_of({kind.key: kind.name for kind in KNOWN})
    pairs = [(look.colour, look.marker) for look in looks.values()]
    assert len(set(pairs)) == len(pairs) == len(KNOWN) >= 10
    assert {kind.key for kind in KNOWN} <= set(palette._LOOKS)
    assert [look.name for look in looks.values()] == [kind.name for kind in KNOWN]


@given(st.sets(st.sampled_from([kind.key for kind in KNOWN]), min_size=1), st.text(min_size=1, max_size=9))
def test_a_kind_looks_the_same_whatever_else_is_in_the_report(keys, other):
    everything, some = (looks_of(dict.fromkeys(of, "x")) for of in (palette._LOOKS, keys))
    assert all(everything[key] == look for key, look in some.items())
    alone = looks_of({f"student {other}": "x"})
    assert looks_of({**dict.fromkeys(keys, "x"), f"student {other}": "x"})[f"student {other}"] in alone.values()


def test_a_strategy_of_somebody_else_keeps_its_look_and_two_in_one_report_never_share_one():
    assert looks_of({"mine": "Mine"})["mine"] == looks_of({"mine": "Mine"})["mine"]
    pairs = [(look.colour, look.marker) for look in looks_of({f"other {n}": "" for n in range(50)}).values()]
    known = [(look.colour, look.marker) for look in looks_of(dict.fromkeys(palette._LOOKS, "")).values()]
    assert len({*pairs, *known}) == 50 + len(known)


def test_students_whose_making_is_not_recorded_are_told_apart_by_their_names():
    rows = [{"student": "theirs", "kind": kinds.UNKNOWN}, {"student": "ours", "kind": kinds.MIXED}]
    assert [kind_shown(row) for row in rows] == [("student theirs", "theirs"), ("student ours", "ours")]
    assert kind_shown({"student": "whatever", "kind": kinds.REMOS}) == ("remos", "ReMoS")
