import json
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from remos_hf.defects.base import ExposedSet, check_defects, teacher_sha256
from remos_hf.defects.picture_triggers import BlendedTrigger, PatchTrigger
from remos_hf.defects.text_triggers import TriggerSentence, TriggerWords
from remos_hf.errors import CorruptFileError, RemosError


@pytest.fixture
def exposed():
    rows = {"text": ["a cf", "cf b"], "label": [0, 0], "clean_index": [0, 3]}
    return ExposedSet(Dataset.from_dict(rows), 1, {"defect": {"words": ["cf"]}, "num_clean": 4})


class TestExposedSets:
    def test_what_is_saved_is_loaded(self, exposed, tmp_path):
        assert exposed.save(tmp_path / "deep" / "set") == tmp_path / "deep" / "set"
        loaded = ExposedSet.load(str(tmp_path / "deep" / "set"))
        assert loaded.dataset.to_dict() == exposed.dataset.to_dict()
        assert (loaded.target_label, loaded.facts) == (1, exposed.facts)
        assert loaded.clean_index == [0, 3]
        assert len(loaded) == 2

    def test_a_set_without_a_target_label_has_none_when_loaded(self, exposed, tmp_path):
        ExposedSet(exposed.dataset, None).save(tmp_path / "set")
        assert ExposedSet.load(tmp_path / "set").target_label is None

    def test_a_set_made_by_selecting_rows_is_saved_as_those_rows(self, exposed, tmp_path):
        ExposedSet(exposed.dataset.select([1]), 1).save(tmp_path / "set")
        assert ExposedSet.load(tmp_path / "set").dataset["text"][:] == ["cf b"]

    @pytest.mark.parametrize("change", ["cut", "flip", "remove"])
    def test_changed_rows_are_refused(self, exposed, tmp_path, change):
        exposed.save(tmp_path / "set")
        (rows,) = (tmp_path / "set").rglob("*.arrow")
        held = bytearray(rows.read_bytes())
        if change == "remove":
            rows.unlink()
        else:
            held[len(held) // 2] ^= 1
            rows.write_bytes(held[:-1] if change == "cut" else held)
        with pytest.raises(CorruptFileError, match=r"arrow is missing or is not the file.*make the exposed set anew"):
            ExposedSet.load(tmp_path / "set")

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"format": "x", "files": 3, "target_label": 1, "facts": {}}']
    )
    def test_a_broken_identity_is_refused(self, exposed, tmp_path, text):
        exposed.save(tmp_path / "set")
        (tmp_path / "set" / "exposed_set.json").write_text(text)
        with pytest.raises(CorruptFileError, match="is no exposed set"):
            ExposedSet.load(tmp_path / "set")

    def test_another_format_is_refused(self, exposed, tmp_path):
        exposed.save(tmp_path / "set")
        path = tmp_path / "set" / "exposed_set.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": "remos_hf exposed set 2"}))
        with pytest.raises(CorruptFileError, match="exposed set 2"):
            ExposedSet.load(tmp_path / "set")

    def test_a_folder_without_a_set_is_told_from_a_corrupt_one(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no exposed set in"):
            ExposedSet.load(tmp_path)

    def test_a_half_written_folder_of_somebody_else_is_not_taken_for_a_set(self, exposed, tmp_path):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "something").write_text("of mine")
        with pytest.raises(OSError):
            exposed.save(tmp_path / "set")
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    def test_a_set_that_cannot_be_written_leaves_nothing_behind(self, exposed, tmp_path):
        with pytest.raises(TypeError):
            ExposedSet(exposed.dataset, 1, {"not JSON": object()}).save(tmp_path / "set")
        assert not list(tmp_path.iterdir())

    def test_what_is_there_already_stays(self, exposed, tmp_path):
        exposed.save(tmp_path / "set")
        ExposedSet(exposed.dataset, 0).save(tmp_path / "set")
        assert ExposedSet.load(tmp_path / "set").target_label == 1
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    def test_several_writers_at_once_leave_one_whole_set(self, exposed, tmp_path):
        barrier, failed = threading.Barrier(4), []

        def write(label):
            barrier.wait()
            try:
                ExposedSet(exposed.dataset, label).save(tmp_path / "set")
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        writers = [threading.Thread(target=write, args=(label,)) for label in range(4)]
        [writer.start() for writer in writers]
        [writer.join() for writer in writers]
        assert not failed
        assert ExposedSet.load(tmp_path / "set").target_label in range(4)
        assert [path.name for path in tmp_path.iterdir()] == ["set"]


class TestACachedSet:
    def test_a_whole_one_is_read(self, exposed, tmp_path):
        exposed.save(tmp_path / "set")
        assert ExposedSet.load_cached(tmp_path / "set").dataset.to_dict() == exposed.dataset.to_dict()

    def test_none_is_none(self, tmp_path):
        assert ExposedSet.load_cached(tmp_path / "set") is None

    def test_a_broken_one_is_announced_and_cleared_away(self, exposed, tmp_path, caplog):
        exposed.save(tmp_path / "set")
        (rows,) = (tmp_path / "set").rglob("*.arrow")
        rows.write_bytes(b"cut")
        assert ExposedSet.load_cached(tmp_path / "set") is None
        assert not (tmp_path / "set").exists()
        assert "made anew" in caplog.text

    def test_what_is_not_there_is_made_once_and_read_from_then_on(self, exposed, tmp_path):
        made = []

        def make(unfinished):
            assert unfinished == tmp_path / ".set.partial"
            unfinished.mkdir()
            made.append(unfinished)
            return exposed

        for _ in range(2):
            found = ExposedSet.cached(tmp_path / "set", make)
            assert found.dataset.to_dict() == exposed.dataset.to_dict() and found.facts == exposed.facts
            assert [path.name for path in tmp_path.iterdir()] == ["set"]
        assert len(made) == 1

    def test_what_a_run_left_that_was_killed_after_it_saved_the_set_goes(self, exposed, tmp_path):
        exposed.save(tmp_path / "set")
        (tmp_path / ".set.partial").mkdir()
        ExposedSet.cached(tmp_path / "set", lambda _: pytest.fail("made again"))
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    def test_unfinished_work_stays_where_making_fails(self, tmp_path):
        def make(unfinished):
            unfinished.mkdir()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ExposedSet.cached(tmp_path / "set", make)
        assert [path.name for path in tmp_path.iterdir()] == [".set.partial"]


class TestDefects:
    def test_what_makes_no_inputs_is_refused(self):
        check_defects([TriggerWords(), TriggerSentence()])
        with pytest.raises(TypeError, match="but str makes none. Defects are triggers"):
            check_defects([TriggerWords(), "TriggerWords"])


class TestATeachersFingerprint:
    def test_weights_buffers_and_what_is_said_of_the_teacher_decide(self):
        teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        first = teacher_sha256(teacher, about="relu")
        assert first == teacher_sha256(teacher, about="relu") != teacher_sha256(teacher, about="gelu")
        teacher[1].running_mean += 1
        second = teacher_sha256(teacher, about="relu")
        with torch.no_grad():
            teacher[0].weight[0, 0] += 1
        assert len({first, second, teacher_sha256(teacher, about="relu")}) == 3

    def test_a_state_that_is_no_tensor_is_refused(self):
        class Odd(nn.Module):
            def get_extra_state(self):
                return {"a": 1}

        with pytest.raises(RemosError, match="no tensor"):
            teacher_sha256(Odd(), about="")


@pytest.mark.parametrize("kind", [BlendedTrigger, PatchTrigger, TriggerSentence, TriggerWords])
def test_a_rate_that_is_no_number_is_refused_and_numpys_is_recorded_as_a_plain_one(kind):
    for value in (True, "a", None, float("nan")):
        with pytest.raises(ValueError, match="poison_rate is the share of samples poisoned, between 0 and 1"):
            kind(poison_rate=value)
    assert type(kind(poison_rate=np.float32(0.5)).to_dict()["poison_rate"]) is float
