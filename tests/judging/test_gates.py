import pytest
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.evaluation.measures import Rate
from remos_hf.judging.gates import (
    LEARNED,
    MIN_SAMPLES,
    OBEYS,
    left_out,
    of_the_teacher,
    reasons_against,
    twin_learned_nothing,
    unchecked,
)
from remos_hf.judging.rows import rows_of
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
        taught[name]["flip_clean"] = {"word": Rate.of(20, 200).to_dict()}
    assert sorted(set(keys(PLAIN, taught=taught))) == reasons


@given(st.integers(MIN_SAMPLES, 400), st.data())
def test_a_teacher_obeys_from_the_named_share_on(of, data):
    count = data.draw(st.integers(0, of))
    (section,) = report(PLAIN, taught=teachers((count,) * 3, of=of)).sections()
    said = [one.key for one in of_the_teacher(section)]
    assert said == ([] if count / of >= OBEYS else ["implant"] * 3)


@given(st.floats(0.1, 0.99), st.integers(0, 100_000))
def test_a_model_learned_something_where_it_gets_a_share_of_what_the_commonest_label_leaves(commonest, right):
    acc = Rate.of(right, 100_000).to_dict()
    known = {"student": "s", "seed": 0, "acc": acc, "floor_acc": acc, "dir": acc}
    (row,) = rows_of([{**known, "commonest": commonest}], "")
    little = (acc["value"] - commonest) / (1 - commonest) < LEARNED
    assert bool(twin_learned_nothing(row)) == (little or acc["low"] <= commonest)
    (unknown,) = rows_of([known], "")
    assert not twin_learned_nothing(unknown)


@pytest.mark.parametrize(("right", "of", "key"), [(184, 200, ["commonest"]), (3680, 4000, [])])
def test_what_is_above_the_commonest_label_by_chance_alone_learned_nothing(right, of, key):
    several = records("finetune", (4, 4, 4), commonest=0.9)
    several = [{**record, "acc": Rate.of(right, of).to_dict()} for record in several]
    assert keys(several) == key


def test_one_seed_that_learned_nothing_is_enough():
    assert keys(records("finetune", (180, 0, 185), acc=(170, 101, 170))) == ["commonest"]
    assert keys(records("finetune", (180, 0, 185), acc=(170, 170, 170))) == []


def test_one_seed_on_a_few_samples_is_enough():
    several = records("finetune", (180, 180, 180))
    for count, key in ((MIN_SAMPLES - 1, ["samples"]), (MIN_SAMPLES, []), (0, ["samples"])):
        assert keys([*several[:2], {**several[2], "dir": Rate.of(0, count).to_dict()}]) == key


def test_the_reference_is_plain_fine_tuning_or_nothing_is_said_of_it():
    sliced = [{**record, "student": "finetune"} for record in records("remos 0.9", (4, 4, 4))]
    assert keys(sliced) == ["plain"]
    mixed = [sliced[0], *records("finetune", (4, 4, 4))[1:]]
    assert keys(mixed) == ["plain"]
    assert keys([{**record, "made": {}} for record in sliced]) == []


def test_a_floor_of_a_student_that_learned_nothing_is_none():
    twin = {"floor_acc": Rate.of(101, 200).to_dict()}
    assert keys(records("finetune", (180, 180, 180), **twin)) == ["commonest"]
    assert keys(records("finetune", (180, 180, 180), floor_acc=Rate.of(170, 200).to_dict())) == []


def test_a_teacher_of_a_seed_that_no_student_is_of_does_not_matter():
    other = {**teachers()["word-0"], "dir": {"word": Rate.of(20, 200).to_dict()}}
    assert keys(PLAIN, taught={**teachers(), "word-7": other}) == []
    assert keys(PLAIN, taught={**teachers(), "word-2": other}) == ["implant"]


def test_a_teacher_that_gives_one_label_to_everything_does_not_obey():
    taught = teachers((0, 0, 0), of=0)
    for name in ("word-0", "word-1", "word-2"):
        taught[name]["flip"]["word"] = Rate.of(200, 200).to_dict()
    (section,) = report(PLAIN, taught=taught).sections()
    assert "seed 0 may give the target label to 100.0 %" in reasons_against(section)[0].text  # it was not recorded
    for count, found in ((200, {"implant"}), (90, set())):
        for name in ("word-0", "word-1", "word-2"):
            taught[name]["flip_clean"] = {"word": Rate.of(count, 200).to_dict()}
        (section,) = report(PLAIN, taught=taught).sections()
        assert [one.text for one in reasons_against(section)[:1] if "seed 0 gives the target" not in one.text] == []
        assert set(keys(PLAIN, taught=taught)) == found


def test_gates_that_could_not_be_looked_at_for_some_seeds_are_told():
    def told(*names, flip=True):
        taught = {name: one for name, one in teachers().items() if name in names}
        (section,) = report(records("finetune", (180, 180, 180), flip=flip), taught=taught).sections()
        return " ".join(unchecked(section))

    poisoned, clean = [f"word-{seed}" for seed in range(3)], [f"clean-{seed}" for seed in range(3)]
    assert told(*poisoned, *clean) == "" and "obeys its trigger was not recorded." in told(*clean)
    assert "not recorded for seeds 1, 2." in told("word-0", *clean)
    assert "accuracy is not checked for seed 2" in told(*poisoned, *clean[:2])
    assert "accuracy is not checked:" in told(*poisoned)
    assert told(flip=False) == ""


def test_a_floor_of_a_student_that_is_far_less_accurate_is_told():
    for right, said in ((150, True), (165, False)):
        twin = {"floor_acc": Rate.of(right, 200).to_dict()}
        (section,) = report(records("finetune", (180, 180, 180), **twin)).sections()
        assert any("points less accurate" in one for one in unchecked(section)) is said
