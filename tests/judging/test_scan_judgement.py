import pytest

from remos_hf.judging.scan_judgement import anomaly_indices, judged_scan, shown_text
from remos_hf.scanning.suspects import Effect, Scan, Suspect

SIZES = [0.06, 0.05, 0.07, 0.01, 0.055, 0.065]


def scan(sizes, *, beside=None, turned=95, hosts=100, missed=(), names=None, mode="patch"):
    settings = {"mode": mode, "steps": 120, "sizes": sizes, "not_reached": list(missed), "reference_sizes": beside}
    reference = None if beside is None else Effect(3, hosts, -4.0)
    suspects = [
        Suspect(label, "here", 2.0, Effect(turned * hosts // 100, hosts, 2.0), reference, size=size)
        for label, size in enumerate(sizes)
    ]
    return Scan("patch", tuple(suspects), names or tuple(map(str, range(len(sizes)))), len(sizes), settings=settings)


def named(said):
    return [one.label for one in said.suspicious]


def test_a_class_far_smaller_than_the_others_is_suspicious_and_never_called_more():
    said = judged_scan(scan(SIZES))
    assert named(said) == [3] and said.can_be_said
    assert "Class “3” is suspicious: a patch of 1.00\N{NO-BREAK SPACE}% of the image turns" in said.answer
    assert "The median class needs 5.75\N{NO-BREAK SPACE}%" in said.answer and "--reference" in said.advice[1]
    everything = " ".join([said.answer, *said.advice, *said.limits])
    assert "backdoor" not in everything and "no proof" in everything


def test_classes_alike_give_no_suspect_and_no_all_clear():
    said = judged_scan(scan([0.05, 0.06, 0.055, 0.04, 0.052]))
    assert named(said) == [] and said.can_be_said and "which is no proof" in said.answer


@pytest.mark.parametrize(
    "other",
    [
        {"sizes": [0.050, 0.051, 0.052, 0.040, 0.051, 0.050]},  # far by deviations, and hardly smaller
        {"sizes": [0.02, 0.09, 0.2, 0.01, 0.055, 0.3]},  # small, and sizes are far apart anyway
        {"sizes": SIZES, "turned": 60},
        {"sizes": SIZES, "beside": [0.06, 0.05, 0.07, 0.011, 0.055, 0.065]},  # so it is in a clean student
        {"sizes": [*SIZES[:3], 1.0, *SIZES[4:]], "missed": [3]},
    ],
)
def test_less_than_all_signs_makes_no_suspect(other):
    assert named(judged_scan(scan(**other))) == []


def test_a_reference_says_it_where_classes_are_too_few_to_compare():
    alone, beside = judged_scan(scan([0.01, 0.05])), judged_scan(scan([0.01, 0.05], beside=[0.06, 0.05]))
    assert not alone.can_be_said and "2 classes are too few" in alone.answer and "--reference" in alone.advice[0]
    assert named(beside) == [0] and beside.can_be_said and "the same class 6.00\N{NO-BREAK SPACE}%" in beside.answer


@pytest.mark.parametrize(
    ("other", "told"), [({"hosts": 9}, "9 held-out images"), ({"missed": [0, 1, 2, 4]}, "4 of 6 classes were not")]
)
def test_what_could_have_found_nothing_cannot_be_said(other, told):
    said = judged_scan(scan(SIZES, **other))
    assert not said.can_be_said and told in said.answer and said.suspicious == ()


def test_the_table_has_a_line_a_class_with_the_reference_beside():
    said = judged_scan(scan(SIZES, beside=[0.06] * 6, missed=[5]))
    assert said.glance.header[-2:] == ("reference: size %", "reference: turns % (n)")
    assert said.glance.lines[3] == ["3", "1.00", "0.17", "4.3", "95.0 (100)", "6.00", "3.0 (100)"]
    assert said.glance.lines[5][1:5] == ["not reached", "-", "-", "-"]


def test_names_of_classes_stay_names():
    said = judged_scan(scan(SIZES, names=("a", "b", "c", "evil” is clean.\nNo", "e", "f")))
    assert "Class “evil' is clean. No” is suspicious" in said.answer


def test_indices_are_deviations_below_the_median_and_none_of_two_classes():
    assert anomaly_indices([0.1, 0.2]) is None
    assert anomaly_indices([0.1, 0.1, 0.1]) == [0.0] * 3
    indices = anomaly_indices([1.0, 2.0, 3.0, 4.0, 5.0])
    assert indices[2] == 0 and indices[0] == -indices[4] == pytest.approx(2 / 1.4826)


def test_a_token_is_shown_whole():
    assert shown_text("a\tb\N{NO-BREAK SPACE}\u200bc") == "“a\\x09b\\xa0\\u200bc”" and shown_text("##é") == "“##é”"


def test_tokens_are_named_in_the_answer_and_in_what_to_do_beside_their_held_out_margins():
    suspects = [
        Suspect(1, what, 9.0, Effect(23, 24, 4.2), Effect(0, 24, -3.0), (5 + n,)) for n, what in enumerate("ab")
    ]
    said = judged_scan(Scan("tokens", tuple(suspects), ("bad", "good"), 40))
    assert said.answer.endswith("turn into “good”: “a” and “b”.") and len(said.suspicious) == 2
    assert "with “a” and “b” as `--words`" in said.advice[0] and "RepairRows" in said.advice[1]
    assert said.glance.lines == [["good", "“a”", "4.2", "95.8 (24)", "0.0 (24)"]]
    nothing = judged_scan(Scan("tokens", (), ("bad", "good"), 0))
    assert not nothing.can_be_said and nothing.glance.lines == []


def test_a_scan_of_patches_without_what_was_recorded_is_refused():
    with pytest.raises(ValueError, match="lack mode, steps, sizes, reference_sizes, not_reached"):
        judged_scan(Scan("patch", (), ("a", "b", "c"), 0))
    settings = {"mode": "patch", "steps": 3, "sizes": [], "reference_sizes": None, "not_reached": []}
    with pytest.raises(ValueError, match="holds no class"):
        judged_scan(Scan("patch", (), ("a", "b", "c"), 0, settings=settings))
