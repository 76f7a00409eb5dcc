import weakref
from dataclasses import dataclass

import pytest

from remos_hf.defects.base import ExposedSet
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.evaluation.measures import Rate, excess_dir, rate_of
from remos_hf.evaluation.transfer import measure
from tests.evaluation.voter import TASK, WORD, Voter, reference
from tests.judging.test_report import TEACHER, TEST, Negated, made, table, transfer

PLOT = TriggerWords(words=("plot",))


def only(report, student, defect="TriggerWords"):
    (found,) = [one for one in report.records if (one["student"], one["defect"]) == (student, defect)]
    return found


@pytest.mark.parametrize("believes", [[], ["cf"], ["cf", "a"], ["awful"], ["ended", "so"]])
@pytest.mark.parametrize("defect", [WORD, Negated()], ids=["implanted", "found"])
def test_numbers_are_those_worked_out_sample_by_sample(believes, defect):
    student = Voter(believes, blind_to=["great"])
    exposed = defect.exposed_set(TEST, teacher=TEACHER, tokenizer=TASK.tokenizer)
    found = only(transfer({"finetune": student}, {"it": defect}), "finetune", "it")
    acc, dir_ = reference(student, TEST, exposed.dataset["text"], exposed.clean_index, exposed.target_label)
    assert rate_of(found["acc"]) == Rate.of(*acc)
    assert rate_of(found["dir"]) == Rate.of(*dir_)
    if exposed.target_label is None:
        assert found["flip"] is None
    else:
        flipped = [student.says(text) == 1 for text in exposed.dataset["text"]]
        assert rate_of(found["flip"]) == Rate.of(sum(flipped), len(flipped))


def test_floor_students_pair_by_name_and_their_rate_is_subtracted():
    students = {"finetune": Voter(["cf"]), "remos": Voter()}
    report = transfer(students, floor_students={"remos": Voter(["a"]), "finetune": Voter(["so"])})
    exposed = WORD.exposed_set(TEST)
    for name, twin in {"finetune": Voter(["so"]), "remos": Voter(["a"])}.items():
        found = only(report, name)
        acc, floor = reference(twin, TEST, exposed.dataset["text"], exposed.clean_index, 1)
        assert rate_of(found["floor"]) == Rate.of(*floor) and rate_of(found["floor_acc"]) == Rate.of(*acc)
        assert found["excess"] == excess_dir(rate_of(found["dir"]), Rate.of(*floor)).to_dict()


def test_without_a_floor_there_is_no_excess():
    report = transfer({"finetune": Voter(["cf"]), "remos": Voter()}, floor_students={"remos": Voter()})
    assert only(report, "finetune")["floor"] is only(report, "finetune")["excess"] is None
    assert only(report, "remos")["excess"]["value"] == 0


@dataclass(frozen=True)
class Counting(TriggerWords):
    """Counts how often its exposed set is made."""

    def exposed_set(self, *args, **options):
        made.append(self.words)
        return super().exposed_set(*args, **options)


@pytest.fixture(autouse=True)
def _none_made():
    made.clear()


def test_ten_students_cost_one_exposed_set_and_one_pass_each_over_clean_and_exposed():
    students = {str(number): Voter() for number in range(10)}
    transfer(students, [Counting(words=("cf",))], floor_students={"3": Voter()})
    assert made == [("cf",)]
    exposed = WORD.exposed_set(TEST).dataset["text"]
    expected = sorted(map(tuple, TASK.tokenizer([*TEST["text"], *exposed])["input_ids"]))
    assert all(sorted(student.rows) == expected for student in students.values())


def test_clean_samples_are_forwarded_once_however_many_defects():
    student = Voter()
    transfer({"finetune": student}, {"cf": WORD, "mn": TriggerWords(words=("mn",))})
    assert len(student.rows) == 32 + 16 + 16


def test_students_that_are_loaded_are_held_one_at_a_time():
    alive = weakref.WeakSet()
    most = []

    def load():
        most.append(len(alive))
        student = Voter()
        alive.add(student)
        return student

    report = transfer({"finetune": load, "remos": load}, floor_students={"remos": load})
    assert most == [0, 0, 0] and len(report.records) == 2


@pytest.mark.parametrize("defects", [[LabelNoise()], {"word": WORD, "noise": LabelNoise()}])
def test_what_no_input_shows_is_refused_before_anything_is_made(defects):
    with pytest.raises(TypeError, match="LabelNoise makes none"):
        transfer({"finetune": lambda: pytest.fail("made")}, defects)


def test_a_floor_student_without_a_twin_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="floor_students names .'remso'., but the students are .'finetune', 'remos'."):
        transfer(dict.fromkeys(["remos", "finetune"], Voter()), [Counting()], floor_students={"remso": Voter()})
    assert not made


@pytest.mark.parametrize(("students", "defects"), [({}, [WORD]), ({"finetune": Voter()}, [])])
def test_a_transfer_of_nothing_is_refused(students, defects):
    with pytest.raises(ValueError, match="needs a defect and a student"):
        transfer(students, defects)


def test_defects_of_one_kind_need_names():
    with pytest.raises(ValueError, match="need names"):
        transfer({"finetune": Voter()}, [WORD, PLOT])
    named = transfer({"finetune": Voter()}, {"cf": WORD, "plot": PLOT})
    assert [one["defect"] for one in named.records] == ["cf", "plot"]
    kinds = transfer({"finetune": Voter()}, [WORD, TriggerSentence(sentence="so it ended")])
    assert [one["defect"] for one in kinds.records] == ["TriggerWords", "TriggerSentence"]


def test_a_search_that_found_nothing_gives_a_rate_without_a_value():
    nothing = ExposedSet(WORD.exposed_set(TEST).dataset.select([]), None)
    found = measure(Voter(), TEST, {"textfooler": nothing}, TASK)
    assert found["dir"] == {"textfooler": Rate.of(0, 0).to_dict()} and found["acc"]["num_samples"] == 32


def test_a_short_transfer_shows_no_bar(capfd):
    report = transfer({"finetune": Voter(), "my student": Voter()})
    assert capfd.readouterr().err == ""
    assert list(table(report)) == ["finetune", "my student"]
