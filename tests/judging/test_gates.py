import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.gates import (
    LEARNED,
    MIN_SAMPLES,
    OBEYS,
    left_out,
    near_commonest,
    of_the_teacher,
    reasons_against,
)
from remos_hf.judging.rows import teacher_row
from tests.judging.reports import PLAIN, records, report, teachers


def keys(*several, **options):
    (section,) = report(*several, **options).sections()
    return [one.key for one in reasons_against(section)]


def test_sound_numbers_pass_all_gates():
    assert keys(PLAIN) == []


@pytest.mark.parametrize(
    ("several", "options", "key"),
    [
        ([], {}, "plain"),
        ([records("finetune", (9, 9, 9), floors=None)], {}, "floor"),
        ([records("finetune", (9, 9, 9), acc=(101, 102, 103))], {}, "commonest"),
        ([records("finetune", (9, 9, 9), floors=(1, 1, 1), of=MIN_SAMPLES - 1)], {}, "samples"),
        ([PLAIN[:2]], {}, "seeds"),
        ([PLAIN], {"taught": teachers((198, 170, 198))}, "implant"),
        ([PLAIN], {"taught": teachers((9, 9, 9), of=10)}, "teacher samples"),
        ([PLAIN], {"taught": teachers(acc=(172, 140, 172))}, "implant accuracy"),
    ],
)
def test_each_gate_gives_its_own_reason(several, options, key):
    others = [] if several else [records("remos 0.9", (9, 9, 9))]
    assert key in keys(*several, *others, **options)


def test_what_was_left_out_of_the_exposed_inputs_is_told_but_for_the_target_label():
    facts = {
        "num_clean": 300,
        "num_exposed": 200,
        "num_left_out": {"has the target label": 90, "cut off by max_length": 10},
    }
    (section,) = report(PLAIN, audits={"SST-2": {"exposed": {"word": facts}}}).sections()
    (said,) = left_out(section)
    assert said.startswith("Of 300 clean samples 200 were exposed") and said.endswith(": 10 (cut off by max_length).")
    facts["num_left_out"].pop("cut off by max_length")
    (section,) = report(PLAIN, audits={"SST-2": {"exposed": {"word": facts}}}).sections()
    assert left_out(section) == []


def test_the_gates_of_an_implant_are_no_gates_of_a_defect_that_was_found():
    assert keys(records("finetune", (190, 190, 190), flip=False), taught=teachers((10, 10, 10))) == []


@pytest.mark.parametrize(("flips", "reasons"), [(198, []), (100, ["implant"])])
def test_a_teacher_whose_labels_are_of_another_task_obeys_by_all_samples(flips, reasons):
    taught = teachers((0, 0, 0), of=0)
    for name in ("word-0", "word-1", "word-2"):
        taught[name]["flip"]["word"] = Rate.of(flips, 200).to_dict()
    assert sorted(set(keys(PLAIN, taught=taught))) == reasons


@given(st.integers(MIN_SAMPLES, 400), st.data())
def test_a_teacher_obeys_from_the_named_share_on(of, data):
    count = data.draw(st.integers(0, of))
    row = teacher_row(teachers((count,) * 3, of=of), ("word",), "word")
    said = [one.key for one in of_the_teacher(row, None, implanted=True)]
    assert said == ([] if count / of >= OBEYS else ["implant"] * 3)


@given(st.floats(0.1, 0.99), st.floats(0, 1))
def test_a_model_learned_something_where_it_gets_a_share_of_what_the_commonest_label_leaves(commonest, acc):
    row = {"commonest": commonest, "acc": type("Rate", (), {"value": acc})()}
    assert near_commonest(row) == ((acc - commonest) / (1 - commonest) < LEARNED)
    assert not near_commonest({**row, "commonest": None})
