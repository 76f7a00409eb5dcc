import weakref
from dataclasses import dataclass

import pytest
from datasets import ClassLabel
from transformers import DataCollatorWithPadding, PretrainedConfig

from remos_hf.adapters.transformers_models import with_new_head
from remos_hf.adapters.weights_hash import hash_of_folder, hash_of_model
from remos_hf.auditing.student_files import load_student
from remos_hf.defects.label_noise import LabelNoise
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.evaluation.measures import Rate, excess_dir, rate_of
from remos_hf.judging.kinds import kind_of
from remos_hf.strategies import Finetune, Random, Remos
from remos_hf.training.trainer import RemosTrainer
from tests.defects import toy
from tests.evaluation.voter import TASK, WORD, Voter, reference
from tests.judging.test_report import TEACHER, TEST, Negated, made, transfer

PLOT = TriggerWords(words=("plot",))


def only(report, student, defect="TriggerWords"):
    (found,) = [one for one in report.records if (one["student"], one["defect"]) == (student, defect)]
    return found


@pytest.mark.parametrize("believes", [[], ["cf"], ["cf", "a"], ["awful"], ["ended", "so"]])
@pytest.mark.parametrize("defect", [WORD, Negated()], ids=["implanted", "found"])
def test_numbers_are_those_worked_out_sample_by_sample(believes, defect):
    student = Voter(believes, blind_to=["great"])
    exposed = defect.exposed_set(TEST, teacher=TEACHER, **TASK.exposing)
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


def test_a_short_transfer_shows_no_bar(capfd):
    report = transfer({"finetune": Voter(), "my student": Voter()})
    assert capfd.readouterr().err == ""
    assert [one["student"] for one in report.records] == ["finetune", "my student"]


# --- what is known of a student ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two students in folders: one sliced, with its record; one without a record."""
    place, tokenizer = tmp_path_factory.mktemp("students"), toy.tokenizer()
    trainer = RemosTrainer(
        toy.model(), toy.args(place / "run", max_steps=1, learning_rate=3e-3), strategy=Random(0.9),
        processing_class=tokenizer, train_dataset=TASK.tokenize(toy.data(16)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(place / "sliced")
    toy.model(1).save_pretrained(place / "plain")
    tokenizer.save_pretrained(place / "plain")
    return place


def test_a_student_may_be_a_folder_whose_weights_and_making_are_told(folders):
    report = transfer({"sliced": folders / "sliced", "finetune": str(folders / "plain")}, task=None)
    sliced, plain = only(report, "sliced"), only(report, "finetune")
    assert sliced["given"] == {"weights": hash_of_folder(folders / "sliced"), "from": "sliced"}
    assert plain["given"] == {"weights": hash_of_model(toy.model(1)), "from": "plain"}
    assert sliced["made"]["strategy"]["name"] == "Random" and sliced["made"]["slice_ratio"] == 0.9
    assert sliced["made"]["squares_reset"] > 0 and set(plain["made"]) == {"seconds"}
    in_memory = only(transfer({"it": load_student(folders / "sliced").model}), "it")
    assert (in_memory["acc"], in_memory["dir"]) == (sliced["acc"], sliced["dir"])
    assert in_memory["given"] == {"weights": sliced["given"]["weights"], "from": None}


def test_without_a_task_texts_are_found_under_their_usual_names(folders):
    usual = transfer({"it": folders / "plain"}, task=None)
    renamed = TEST.rename_column("text", "sentence")
    found = transfer({"it": folders / "plain"}, task=None, dataset=renamed)
    assert [one["outcomes"] for one in found.records] == [one["outcomes"] for one in usual.records]
    named = {"it": TriggerWords(text_columns="sentence")}
    assert transfer({"it": folders / "plain"}, named, task=None, dataset=renamed).records
    with pytest.raises(ValueError, match="which column holds the text is not clear"):
        transfer(
            {"it": folders / "plain"},
            task=None,
            dataset=TEST.rename_column("text", "a").add_column("b", ["x"] * len(TEST)),
        )


def test_how_models_in_memory_were_made_is_what_the_caller_says_and_else_not_known():
    students = {"finetune": Voter(), "fast": Voter(), "cut": Voter(), "other": Voter()}
    fast = {"strategy": Finetune().to_dict(), "lr_factor": 3.0}
    report = transfer(students, made={"finetune": Finetune(), "fast": fast, "cut": Remos(0.5)}, seed=4)
    made = {name: only(report, name)["made"] for name in students}
    kinds = {name: kind_of(one).key for name, one in made.items()}
    assert kinds == {"finetune": "plain", "fast": "faster", "cut": "remos", "other": "unknown"}
    assert made["cut"]["slice_ratio"] == 0.5 and made["cut"]["seed"] == 4
    with pytest.raises(ValueError, match="made names .'gone'., but the students are"):
        transfer({"finetune": Voter()}, made={"gone": Finetune()})


def test_a_higher_learning_rate_is_told_where_records_say_both():
    at = {"strategy": Finetune().to_dict(), "lr_factor": 1.0}
    said = {"finetune": {**at, "learning_rate": 2e-5}, "fast": {**at, "learning_rate": 6e-5}, "unknown": at}
    report = transfer(dict.fromkeys(said, Voter()), made=said)
    assert [only(report, name)["made"]["lr_factor"] for name in said] == [1.0, 3.0, 1.0]


def test_the_teacher_is_measured_too_if_it_tells_as_many_labels_apart():
    report = transfer({"finetune": Voter()}, name="t")
    found = report.settings["teachers"]["t"]["given"]
    assert found["dir"]["TriggerWords"]["value"] == 1.0 and found["acc"]["num_samples"] == 32
    assert "given-2" in transfer({"finetune": Voter()}, name="t", seed=2).settings["teachers"]["t"]
    both = sum((transfer({"finetune": Voter()}, name="t", seed=seed) for seed in (1, 2)), report)
    assert set(both.settings["teachers"]["t"]) == {"given", "given-1", "given-2"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"teacher": None}, "no teacher was given"),
        ({"teacher": toy.model().bert}, "the teacher has no head that tells labels apart"),
        ({"teacher": with_new_head(toy.model(), 3, seed=0)}, "the teacher tells 3 labels apart, and the task has 2"),
        ({"teacher_unmeasured": "its head is fresh"}, "its head is fresh"),
    ],
)
def test_why_a_teacher_is_not_measured_is_told(options, told):
    settings = transfer({"finetune": Voter()}, name="t", **options).settings
    assert settings["audits"]["t"]["teacher_unmeasured"] == told and settings["teachers"] == {"t": {}}


def test_what_is_searched_for_on_a_teacher_needs_one():
    with pytest.raises(ValueError, match="'found' is searched for on the students' teacher: give teacher="):
        transfer({"finetune": Voter()}, {"found": Negated()}, teacher=None)


def test_without_a_task_the_first_student_is_a_folder():
    with pytest.raises(ValueError, match="Nothing says how samples are read: give task="):
        transfer({"finetune": Voter()}, task=None)


def test_a_students_classes_are_in_the_order_of_the_samples(folders, tmp_path):
    student = toy.model()
    student.config.id2label, student.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    student.save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bad', 'good'.*the same ones in another order"):
        transfer({"finetune": tmp_path}, dataset=named("bad", "good"))
    assert transfer({"finetune": tmp_path}, dataset=named("good", "bad"))


def named(*names):
    return TEST.cast_column("label", ClassLabel(names=list(names)))


def voter(*names):
    """A classifier that says how its outputs are called."""
    model = type("VoterForSequenceClassification", (Voter,), {})(["cf"])
    model.config = PretrainedConfig(id2label=dict(enumerate(names)))
    return model


def test_labels_that_are_other_outputs_of_a_student_are_refused(caplog):
    expected = transfer({"finetune": Voter(["cf"])}).records[0]["dir"]
    agreed = transfer({"finetune": voter("bad", "good")}, dataset=named("BAD", "good"))
    assert agreed.records[0]["dir"] == expected and not caplog.records
    with pytest.raises(ValueError, match="has the classes .'good', 'bad'., and the model the same ones in another"):
        transfer({"finetune": voter("bad", "good")}, dataset=named("good", "bad"))
    with pytest.raises(ValueError, match="The data has the 3 classes .*, but the model tells 2 apart, .'bad', 'good'."):
        transfer({"finetune": voter("bad", "good")}, dataset=named("bad", "good", "so so"))
    other = transfer({"finetune": voter("bad", "good")}, dataset=named("no", "yes"))
    assert other.records[0]["dir"] == expected
    assert "calls its classes ['bad', 'good'] and the samples ['no', 'yes']: they are matched by number" in caplog.text


def test_a_teacher_with_its_classes_in_another_order_is_not_measured():
    report = transfer({"finetune": Voter()}, teacher=voter("good", "bad"), dataset=named("bad", "good"))
    (chosen,) = report.settings["audits"].values()
    assert (
        chosen["teacher_unmeasured"] == "the teacher's classes are good, bad, in this order, and the task's bad, good"
    )


def test_data_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="dataset holds no sample"):
        transfer({"finetune": Voter()}, dataset=TEST.select([]))
