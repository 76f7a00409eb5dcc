import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_model, save_file
from torch import nn

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.weights_hash import hash_of_folder, hash_of_model
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.sharing.hub import Pushed, push_to_hub, push_while_training
from remos_hf.sharing.hub_results import RESULTS_FILE
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.plain import Finetune
from tests import tiny
from tests.judging.reports import PLAIN, RANDOM
from tests.sharing.conftest import TOKEN
from tests.sharing.reports import audited, measured

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")
STUDENT = {"README.md", "config.json", "model.safetensors"}
RECORD = {"remos_config.json", "remos_coverage.safetensors", "remos_slice.safetensors"}
MINE = STUDENT | RECORD


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.INFO, "remos_hf.sharing")


def kept(error):
    """The folder that an error says was kept."""
    return Path(re.search(r"are kept in (\S+)\. To go on", str(error)).group(1))


# --- what is pushed ---


def test_a_folders_student_is_pushed_in_one_private_commit_and_all_else_is_told(hub, folder, caplog):
    pushed = push_to_hub(folder, "me/student")
    held = hub.repos["me/student"]
    assert set(held) == set(pushed.files) == MINE and hub.private["me/student"] and hub.commits == 1
    assert pushed.files == {name: len(content) for name, content in held.items()}
    assert pushed.url == f"{hub.url}/me/student" and pushed.commit == hub.revisions["me/student"]
    assert held["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    behind = next(line for line in caplog.messages if line.startswith("Not pushed"))
    for junk in ("training_args.bin", "optimizer.pt", "checkpoint-4/model.safetensors", ".cache/x", "_tmp/y", "a.pkl"):
        assert junk in behind
    assert "weights.dat" in behind and "notes.txt" in behind
    everything = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(pushed.behind) == everything - MINE


def test_a_model_is_saved_as_safetensors_with_its_record_card_and_report(hub, made):
    student, record = made
    given = measured(hash_of_model(student))
    pushed = push_to_hub(
        student, "me/student", record=record, report=given, benchmark="me/defect-inheritance", private=False
    )
    held = hub.repos["me/student"]
    assert set(held) == STUDENT | RECORD | {"report.json", RESULTS_FILE} == set(pushed.files)
    assert not hub.private["me/student"]
    card = ModelCard(held["README.md"].decode())
    assert [one.metric_value for one in card.data.eval_results] == [0.84, 0.05]
    assert json.loads(held["report.json"])["records"][0]["student"] == "finetune"


def test_a_folders_figures_are_published_only_if_its_very_weights_were_measured(hub, folder):
    given = measured(hash_of_folder(folder))
    push_to_hub(folder, "me/student", report=given, benchmark="me/defect-inheritance")
    held = hub.repos["me/student"]
    assert RESULTS_FILE in held and b"model-index" in held["README.md"]
    other = tiny.bert(seed=5)
    other.save_pretrained(folder)
    push_to_hub(folder, "me/student", report=given, benchmark="me/defect-inheritance")
    held = hub.repos["me/student"]
    assert RESULTS_FILE not in held and b"model-index" not in held["README.md"]
    assert b"The report beside them is of other weights" in held["README.md"]


def test_a_student_pulled_in_a_new_process_answers_as_it_did(hub, folder, made, tmp_path):
    student, _ = made
    push_to_hub(folder, "me/student")
    ids = tiny.text_batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = student(ids).logits
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pull.py")), "me/student", json.dumps(ids.tolist())],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert torch.equal(torch.tensor(found["logits"]), expected)
    assert not found["needed_ours"] and found["same_slice"]


def test_a_thin_module_is_saved_as_trainer_saves_it(hub, tmp_path):
    student = ImageClassifier(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), head=("1",))
    record = Sidecars.of(Finetune(), Finetune().prepare(student, None), student)
    push_to_hub(student, "me/thin", record=record)
    (tmp_path / "w.safetensors").write_bytes(hub.repos["me/thin"]["model.safetensors"])
    other = ImageClassifier(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), head=("1",))
    load_model(other, str(tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def test_the_report_beside_a_student_is_read_and_another_wins(hub, folder):
    audited().save(folder / "report.json")
    push_to_hub(folder, "me/student")
    assert b"students made the same way from a teacher that we poisoned" in hub.repos["me/student"]["README.md"]
    push_to_hub(folder, "me/student", report=measured(hash_of_folder(folder)))
    assert b"Measured of these weights" in hub.repos["me/student"]["README.md"]


def test_weights_whose_first_bytes_are_those_of_a_pickle_are_pushed(hub, folder):
    for length in range(500, 900):
        save_file({"w": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt", "x": "a" * length})
        head = (folder / "model.safetensors").read_bytes()[:2]
        if head[0] == 0x80 and 2 <= head[1] <= 5:
            break
    else:
        raise AssertionError("no header begins so")
    push_to_hub(folder, "me/student")
    assert hub.repos["me/student"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_no_path_of_this_machine_is_pushed(hub, folder, tmp_path, caplog):
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(tmp_path / "teacher"), "notes": {"log": ["see /home/maria/acme/run.log"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "runs" / "Nov28_marias-laptop").mkdir(parents=True)
    (folder / "runs" / "Nov28_marias-laptop" / "events.out.tfevents.1.marias-laptop").write_text("marias-laptop")
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(tmp_path / "checkpoint-1")}))
    before = (folder / "config.json").read_bytes()
    push_to_hub(folder, "me/student", command=f"remos train /home/maria/acme/teacher --output {tmp_path}/student")
    held = hub.repos["me/student"]
    assert set(held) == MINE and (folder / "config.json").read_bytes() == before
    assert not [name for name, content in held.items() if b"maria" in content or bytes(tmp_path) in content]
    assert json.loads(held["config.json"])["_name_or_path"] == "teacher"
    assert b"remos train teacher --output student" in held["README.md"]
    assert "paths of this machine that it names: config.json" in caplog.text


def test_an_earlier_pushs_adapters_go_where_whole_weights_come_and_strangers_files_stay(hub, folder):
    theirs = {"model_ema.safetensors": b"x", "pytorch_model.bin": b"x", "notes.txt": b"x", "runs/a": b"x"}
    hub.hold("me/student", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", **theirs})
    push_to_hub(folder, "me/student")
    assert set(hub.repos["me/student"]) == MINE | set(theirs)


def test_a_checkpoint_is_pushed_while_training_goes_on_and_may_go_meanwhile(hub, folder, caplog):
    hub.waits = threading.Event()
    job = push_while_training(folder, "me/student", commit_message="step 4")
    shutil.rmtree(folder)
    hub.waits.set()
    assert set(job.result(30).files) == MINE == set(hub.repos["me/student"]) and hub.private["me/student"]


def test_a_push_that_fails_while_training_is_a_warning(hub, folder, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    hub.breaks = 1
    with pytest.raises(RemosError):
        push_while_training(folder, "me/student").result(30)
    assert "training goes on" in caplog.text and list((tmp_path / "temporary").iterdir()) == []


def test_a_tokenizer_goes_with_it(hub, folder):
    class Words:
        def save_pretrained(self, place):
            (Path(place) / "vocab.txt").write_text("a")

    assert "vocab.txt" in push_to_hub(folder, "me/student", processing_class=Words()).files


def test_a_record_that_is_given_stands_for_the_one_beside_the_student(hub, folder, made):
    record = Sidecars.of(Finetune(), Finetune().prepare(made[0], None), made[0])
    push_to_hub(folder, "me/student", record=record)
    held = hub.repos["me/student"]
    assert not RECORD - {"remos_config.json"} & set(held)
    assert json.loads(held["remos_config.json"])["strategy"]["name"] == "Finetune"


def test_nothing_in_the_students_folder_is_written(hub, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push_to_hub(folder, "me/student", report=audited())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_dry_run_lists_what_a_push_would_hold_and_asks_no_network_and_no_token(
    hub, folder, made, caplog, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    dry = push_to_hub(folder, "me/student", report=audited(), dry_run=True)
    assert hub.log == [] and dry.url is dry.commit is None
    assert all(name in caplog.text for name in dry.files)
    assert dry.files == push_to_hub(folder, "me/student", report=audited(), token=TOKEN).files
    assert isinstance(push_to_hub(made[0], "me/x", record=made[1], dry_run=True), Pushed)


def test_nothing_is_left_on_disk(hub, folder, made, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    push_to_hub(folder, "me/student")
    push_to_hub(made[0], "me/student", record=made[1], dry_run=True)
    with pytest.raises(ValueError, match="0 students"):
        push_to_hub(folder, "me/student", report=audited(PLAIN, RANDOM))
    assert list((tmp_path / "temporary").iterdir()) == []


# --- again, and into what is there ---


def test_a_second_push_finds_nothing_to_do(hub, folder, caplog):
    first = push_to_hub(folder, "me/student", report=audited(), dataset="o/d")
    second = push_to_hub(folder, "me/student", report=audited(), dataset="o/d")
    assert hub.commits == 1 and second == first
    assert "Nothing to do" in caplog.text


@pytest.mark.parametrize("lfs", [False, True])
def test_an_upload_that_breaks_off_leaves_nothing_to_see_and_goes_on(hub, folder, lfs):
    hub.lfs, hub.breaks = lfs, 1
    with pytest.raises(
        RemosError, match=r"broke off.*nothing half-pushed.*is as it was\. To go on: push_to_hub\("
    ) as error:
        push_to_hub(folder, "me/student")
    assert str(folder) in str(error.value) and hub.repos["me/student"] == {}
    uploaded = [path for method, path, _ in hub.log if method == "PUT"]
    assert len(uploaded) == (3 if lfs else 0)
    push_to_hub(folder, "me/student")
    assert set(hub.repos["me/student"]) == MINE and hub.commits == 1
    assert [path for method, path, _ in hub.log if method == "PUT"] == uploaded  # the large ones had arrived
    assert hub.repos["me/student"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_model_whose_push_breaks_off_is_kept_and_the_message_is_the_way_on(hub, made):
    hub.breaks = 1
    student, record = made
    with pytest.raises(RemosError, match="are kept in") as error:
        said = {"report_student": "remos 0.9", "command": "make it", "private": False}
        push_to_hub(student, "me/student", record=record, report=audited(), **said)
    place = kept(error.value)
    try:
        call = re.search(r"push_to_hub\((.*)\)\. Large", str(error.value)).group(1)
        assert "report_student='remos 0.9'" in call and "private=False" in call and TOKEN not in str(error.value)
        eval(f"push({call})", {"push": push_to_hub})  # noqa: S307 - our own message
        held = hub.repos["me/student"]
        assert set(held) == STUDENT | RECORD | {"report.json"} and not hub.private["me/student"]
        assert b"make it" in held["README.md"]
    finally:
        shutil.rmtree(place)


def test_a_repository_that_exists_keeps_its_visibility_and_its_other_files(hub, folder, caplog):
    hub.hold("me/student", {"LICENSE": b"mine"}, private=False)
    push_to_hub(folder, "me/student", private=True)
    assert not hub.private["me/student"] and hub.repos["me/student"]["LICENSE"] == b"mine"
    assert "me/student exists, and stays PUBLIC" in caplog.text


def test_what_an_earlier_student_left_goes_with_the_same_commit(hub, folder, made):
    other = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.md": b"kept"}
    hub.hold(
        "me/student", {**other, "report.json": b"{}", ".eval_results/remos_x.yaml": b"", ".eval_results/a.yaml": b""}
    )
    push_to_hub(folder, "me/student")
    assert set(hub.repos["me/student"]) == MINE | {"notes.md", ".eval_results/a.yaml"} and hub.commits == 1


def test_a_repository_that_moved_is_followed_and_the_log_says_so(hub, folder, caplog):
    hub.hold("me/new", {})
    hub.moved["me/old"] = "me/new"
    pushed = push_to_hub(folder, "me/old")
    assert set(hub.repos["me/new"]) == MINE and "me/old" not in hub.repos
    assert "me/old has moved to me/new" in caplog.text and pushed.url.endswith("/me/new")


def test_another_branch_is_made_and_the_main_one_left_alone(hub, folder):
    push_to_hub(folder, "me/student", revision="try")
    assert set(hub.repos["me/student@try"]) == MINE and hub.repos["me/student"] == {}
    push_to_hub(folder, "me/student", revision="try")
    assert hub.commits == 1


# --- what goes wrong ---


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RemosError, match="no token.*hf auth login"):
        push_to_hub(folder, "me/student")
    with pytest.raises(RemosError, match="no token"):
        push_to_hub(folder, "me/student", token=False)
    assert hub.log == []


def test_a_token_that_is_refused_is_named_as_the_reason(hub, folder):
    with pytest.raises(RemosError, match=r"refused the token \(401\).*may write to me/student") as error:
        push_to_hub(folder, "me/student", token="hf_wrong")
    assert "hf_wrong" not in str(error.value) and hub.repos == {}


def test_a_hub_that_answers_not_found_is_told(hub, folder):
    with pytest.raises(RemosError, match=r"no such repository.*\(404\).*me/student is right"):
        push_to_hub(folder, "me/student", endpoint=f"{hub.url}/nowhere")


def test_without_a_network_the_model_is_kept(online, made):
    online("http://127.0.0.1:9")
    with pytest.raises(RemosError, match="could not be reached") as error:
        push_to_hub(made[0], "me/student", record=made[1])
    place = kept(error.value)
    assert {path.name for path in place.iterdir()} == STUDENT | RECORD
    assert Sidecars.load(place).relevant_slice == made[1].relevant_slice
    shutil.rmtree(place)


def test_offline_mode_is_told(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RemosError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "me/student")


def test_a_student_of_which_nothing_is_known_is_refused(folder, made):
    with pytest.raises(RemosError, match="Pass record="):
        push_to_hub(made[0], "me/student", dry_run=True)
    (folder / "remos_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="nothing says how this student was made"):
        push_to_hub(folder, "me/student", dry_run=True)
    with pytest.raises(FileNotFoundError, match="no folder"):
        push_to_hub(folder / "nowhere", "me/student", dry_run=True)


@pytest.mark.parametrize("name", ["remos_slice.safetensors", "remos_coverage.safetensors"])
def test_a_record_that_was_tampered_with_is_not_pushed(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=name):
        push_to_hub(folder, "me/student", dry_run=True)


def test_weights_that_are_only_pickled_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RemosError, match="pickles only.*pytorch_model.bin.*runs whatever"):
        push_to_hub(folder, "me/student", dry_run=True)


def test_adapters_that_were_not_merged_are_refused(made):
    made[0].peft_config = {"default": {}}
    with pytest.raises(RemosError, match="merge_and_unload"):
        push_to_hub(made[0], "me/student", record=made[1], dry_run=True)


def test_a_report_that_is_none_and_a_name_that_is_none_are_refused(folder):
    with pytest.raises(ValueError, match="user/name"):
        push_to_hub(folder, "student", dry_run=True)
    (folder / "report.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="report.json is no defect report"):
        push_to_hub(folder, "me/student", dry_run=True)


def test_what_was_pushed_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pushed({}).url = "x"
