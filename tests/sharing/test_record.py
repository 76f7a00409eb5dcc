import json
import os

import pytest
import torch
from huggingface_hub import constants

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.sharing.record import CONFIG_FILE, Sidecars
from remos_hf.strategies.base import Preparation
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


def made_by(strategy):
    student = tiny.bert()
    return Sidecars.of(strategy, strategy.prepare(student, tiny.student_data()), student)


@pytest.fixture
def sidecars():
    return made_by(Remos(0.9))


def test_what_is_saved_is_loaded(sidecars, tmp_path):
    sidecars.save(tmp_path)
    loaded = Sidecars.load(tmp_path)
    assert loaded.profile == sidecars.profile
    assert loaded.relevant_slice == sidecars.relevant_slice
    assert loaded.config == json.loads(json.dumps(sidecars.config))


def test_the_config_says_how_the_student_came_to_be(sidecars, tmp_path):
    sidecars.save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["strategy"]["name"] == "Remos"
    assert config["strategy"]["slice_ratio"] == 0.9
    assert config["teacher"]["hash"] == sidecars.relevant_slice.teacher_hash
    assert config["coverage"]["num_samples"] == sidecars.profile.num_samples
    assert config["coverage"]["data_fingerprint"] == sidecars.profile.data_fingerprint
    assert config["slice"]["num_kept"] == sidecars.relevant_slice.num_kept
    assert config["slice"]["ties"] == "mean"
    assert config["competing"] == sidecars.relevant_slice.account.to_dict() and config["coverage"]["capped"] is False
    assert set(config["files"]) == {"remos_coverage.safetensors", "remos_slice.safetensors"}
    assert {"remos_hf", "torch", "transformers"} <= set(config["versions"])


def test_only_what_there_is_is_written(tmp_path):
    made_by(Finetune()).save(tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == [CONFIG_FILE]
    made_by(Random(0.9)).save(tmp_path / "random")
    assert Sidecars.load(tmp_path / "random").profile is None


def test_a_local_teacher_does_not_publish_where_it_lay(tmp_path):
    student = tiny.bert()
    student.config._name_or_path = str(tmp_path)
    sidecars = Sidecars.of(Finetune(), Finetune().prepare(student, None), student)
    assert sidecars.config["teacher"]["id"] == tmp_path.name
    student.config._name_or_path = "google/bert_uncased_L-2_H-128_A-2"
    sidecars = Sidecars.of(Finetune(), Finetune().prepare(student, None), student)
    assert sidecars.config["teacher"]["id"] == "google/bert_uncased_L-2_H-128_A-2"


def licence_of(student):
    return Sidecars.of(Finetune(), Finetune().prepare(student, None), student).config["teacher"].get("license")


def test_the_licence_is_what_the_teachers_own_card_names_and_never_a_guess(tmp_path, monkeypatch):
    student = tiny.bert()
    student.config._name_or_path = str(tmp_path)
    assert licence_of(student) is None
    for text, licence in (
        ("---\nlicense: apache-2.0\n---\n# Teacher", "apache-2.0"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: {: broken\n---\n", None),
        ("# No metadata, license: mit", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(student) == licence
    student.config._name_or_path = "owner/teacher"
    assert licence_of(student) is None
    cached = tmp_path / "models--owner--teacher" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlicense: mit\n---\n")
    student.config._commit_hash = "abc"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert licence_of(student) == "mit"
    body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    body.pretrained_cfg = {"hf_hub_id": "timm/resnet18.a1_in1k", "license": "apache-2.0"}
    assert licence_of(ImageClassifier(body, head=("1",))) == "apache-2.0"


def test_a_body_in_a_thin_module_is_named_as_it_was_published_or_by_its_class():
    body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    student = ImageClassifier(body, head=("1",))
    of = lambda: Sidecars.of(Finetune(), Finetune().prepare(student, None), student).config["teacher"]["id"]  # noqa: E731
    assert of() == "Sequential"
    body.pretrained_cfg = {"hf_hub_id": "timm/resnet18.a1_in1k"}
    assert of() == "timm/resnet18.a1_in1k"


def test_a_file_exchanged_for_another_whole_one_is_noticed(sidecars, tmp_path):
    sidecars.save(tmp_path)
    made_by(Remos(0.5)).relevant_slice.save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="remos_slice.safetensors is missing or is not the file"):
        Sidecars.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "3",
        "null",
        '"remos"',
        '{"files": {}, "format_version": "x"}',
        "[" * 100_000,
        "\udc80",
        "NaN",
    ],
)
def test_a_broken_config_is_refused_by_name(sidecars, tmp_path, content):
    sidecars.save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(content, errors="surrogateescape")
    with pytest.raises(CorruptFileError, match="remos_config.json"):
        Sidecars.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (("format_version",), [None, "1", 1.0, 1e400, True, float("nan"), -1]),
        (("strategy",), [None, [], "Remos"]),
        (("strategy", "name"), [None, 3, ["Remos"]]),
        (("teacher",), [None, "a/b", []]),
        (("teacher", "id"), [3, ["a"], {}]),
        (("files",), [None, [], "x", {"model.safetensors": "0" * 64}]),
        (("files", "remos_slice.safetensors"), [None, 3, "", "abc", "g" * 64]),
        (("coverage",), [3, [], "x"]),
        (("coverage", "num_samples"), [-1, "3", 1e400, True, 2**60]),
        (("slice", "share_kept"), ["0.9", [], {}, None]),
        (("slice", "num_kept"), [0.5, "3", None]),
        (("seconds", "choose"), ["3", [], None, True]),
        (("versions", "torch"), [2, []]),
        (("student",), [3, "Bert"]),
        (("command",), [3, ["remos"]]),
        (("embedding_rows_reset",), ["3", -1, {}]),
        (("ratio_search",), [3, "x"]),
    ],
)
def test_an_entry_of_another_type_is_refused_by_name(sidecars, tmp_path, place, values):
    sidecars.save(tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text()
    for value in values:
        config = json.loads(text)
        within = config[place[0]] if len(place) == 2 else config
        within[place[-1]] = value
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(CorruptFileError, match="remos_config.json"):
            Sidecars.load(tmp_path)


def test_a_sidecar_of_gigabytes_that_were_never_written_is_not_hashed(sidecars, tmp_path):
    sidecars.save(tmp_path)
    os.truncate(tmp_path / "remos_slice.safetensors", 2**33)
    with pytest.raises(CorruptFileError, match="remos_slice.safetensors should hold"):
        Sidecars.load(tmp_path)


def test_a_record_of_gigabytes_is_not_read(sidecars, tmp_path):
    sidecars.save(tmp_path)
    os.truncate(tmp_path / CONFIG_FILE, 2**33)
    with pytest.raises(CorruptFileError, match="remos_config.json has 8,589,934,592 bytes"):
        Sidecars.load(tmp_path)


def test_a_newer_format_asks_for_an_update(sidecars, tmp_path):
    Sidecars({**sidecars.config, "format_version": 99}).save(tmp_path)
    with pytest.raises(CorruptFileError, match="Update remos_hf"):
        Sidecars.load(tmp_path)


def test_a_folder_without_sidecars_says_who_writes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="RemosTrainer"):
        Sidecars.load(tmp_path)


def test_another_strategy_may_not_go_on(sidecars, tmp_path):
    sidecars.save(tmp_path)
    loaded = Sidecars.load(tmp_path)
    loaded.check_strategy(Remos(0.9))
    with pytest.raises(RemosError, match="by Remos with slice_ratio=0.9, but .* Remos with slice_ratio=0.8. Resume"):
        loaded.check_strategy(Remos(0.8))
    with pytest.raises(RemosError, match="by Remos with slice_ratio=0.9, .* but the trainer asks for Finetune with"):
        loaded.check_strategy(Finetune())


# --- of a teacher that the caller knows ---


def test_the_caller_may_know_the_teacher_better_than_the_students_config(tmp_path):
    student, teacher = tiny.bert(), {"id": "owner/teacher", "revision": "abc"}
    student.config._name_or_path, student.config._commit_hash = "runs/copy", "of the copy"
    prepared = Finetune().prepare(student, None)
    found = Sidecars.of(Finetune(), prepared, student, teacher=teacher).config["teacher"]
    assert (found["id"], found["revision"]) == ("owner/teacher", "abc")
    found = Sidecars.of(Finetune(), prepared, student, teacher={"id": "owner/teacher"}).config["teacher"]
    assert found["revision"] is None  # that of the copy is another's
    found = Sidecars.of(Finetune(), prepared, student, teacher={"revision": "abc"}).config["teacher"]
    assert (found["id"], found["revision"]) == ("runs/copy", "abc")
    without = Sidecars.of(Finetune(), prepared, teacher={"id": str(tmp_path)}).config
    assert without["teacher"]["id"] == tmp_path.name and "student" not in without
    for nothing in (None, {}, {"revision": "abc"}):
        with pytest.raises(ValueError, match="names the teacher"):
            Sidecars.of(Finetune(), prepared, teacher=nothing)


@pytest.mark.parametrize(
    "path", ["/home/me/secret/teacher", "~/secret/teacher", "../secret/teacher", "C:\\secret\\teacher"]
)
def test_a_path_that_is_gone_is_not_published_either(path):
    found = Sidecars.of(Finetune(), Preparation(), teacher={"id": path}).config["teacher"]["id"]
    assert found == "teacher"


def test_the_record_says_what_loads_the_student():
    assert made_by(Finetune()).config["student"] == {
        "class": "BertForSequenceClassification",
        "library": "transformers",
    }
    student = ImageClassifier(torch.nn.Sequential(torch.nn.Linear(3, 2)), head=("0",))
    kind = lambda: Sidecars.of(Finetune(), Preparation(), student).config["student"]  # noqa: E731
    assert kind() == {"class": "ImageClassifier", "library": "torch", "architecture": "Sequential"}
    student.body.pretrained_cfg = {"architecture": "resnet18"}
    assert kind() == {"class": "ImageClassifier", "library": "timm", "architecture": "resnet18"}


# --- from wherever it is ---


def test_a_folder_is_read_as_load_reads_it(sidecars, tmp_path):
    sidecars.save(tmp_path)
    assert Sidecars.from_pretrained(tmp_path).relevant_slice == sidecars.relevant_slice
    with pytest.raises(FileNotFoundError, match="nothing says how"):
        Sidecars.from_pretrained(tmp_path / "nowhere")


def test_only_the_record_is_fetched_from_a_hub(hub, sidecars, tmp_path):
    hold(hub, sidecars, tmp_path)
    found = Sidecars.from_pretrained("me/student", endpoint=hub.url)
    assert found.profile == sidecars.profile and found.relevant_slice == sidecars.relevant_slice
    assert not [path for _, path, _ in hub.log if "model.safetensors" in path]
    # Of the config's commit, whatever is pushed meanwhile.
    assert all(hub.revisions["me/student"] in path for _, path, _ in hub.log if path.endswith("slice.safetensors"))


def test_what_the_config_does_not_name_is_not_fetched(hub, tmp_path):
    hold(hub, made_by(Finetune()), tmp_path, **{"remos_slice.safetensors": b"of another student"})
    assert Sidecars.from_pretrained("me/student", endpoint=hub.url).relevant_slice is None
    assert not [path for _, path, _ in hub.log if "remos_slice" in path]


def hold(hub, sidecars, tmp_path, **more):
    sidecars.save(tmp_path / "held")
    files = {path.name: path.read_bytes() for path in (tmp_path / "held").iterdir()}
    hub.hold("me/student", {"model.safetensors": b"weights", **files, **more}, private=True)


def test_a_repository_without_a_record_says_so(hub):
    hub.hold("me/teacher", {"model.safetensors": b"x", "pytorch_model.bin": b"x"})
    with pytest.raises(FileNotFoundError, match="me/teacher holds no remos_config.json.*record="):
        Sidecars.from_pretrained("me/teacher", endpoint=hub.url)


def test_pickles_alone_are_refused_with_the_reason(hub, tmp_path):
    hub.hold("me/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    (tmp_path / "weights.pt").write_bytes(b"x")
    for place, name in (("me/pickled", "pytorch_model.bin"), (tmp_path, "weights.pt")):
        with pytest.raises(RemosError, match=f"pickles only.*{name}.*runs whatever"):
            Sidecars.from_pretrained(place, endpoint=hub.url)
    assert not [path for _, path, _ in hub.log if path.endswith("pytorch_model.bin")]


@pytest.mark.parametrize("name", ["remos_slice.safetensors", "remos_coverage.safetensors"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_tampered_file_on_the_hub_is_noticed(hub, sidecars, tmp_path, name, how):
    hold(hub, sidecars, tmp_path)
    content = hub.repos["me/student"].pop(name)
    if how == "changed":
        hub.repos["me/student"][name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(CorruptFileError, match=f"{name} is missing or is not the file"):
        Sidecars.from_pretrained("me/student", endpoint=hub.url, revision="main")


def test_a_newer_record_on_the_hub_asks_for_an_update(hub, sidecars, tmp_path):
    hold(hub, Sidecars({**sidecars.config, "format_version": 99}), tmp_path)
    with pytest.raises(CorruptFileError, match="Update remos_hf"):
        Sidecars.from_pretrained("me/student", endpoint=hub.url)


def test_a_record_that_names_files_of_others_is_refused(sidecars, tmp_path):
    sidecars.save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["files"]["../../etc/passwd"] = "0"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="no file of ours"):
        Sidecars.load(tmp_path)


def test_a_hub_that_does_not_give_it_says_why(hub):
    with pytest.raises(RemosError, match="no repository me/none.*token"):
        Sidecars.from_pretrained("me/none", endpoint=hub.url)
    hub.hold("me/secret", {CONFIG_FILE: b"{}"}, private=True)
    with pytest.raises(RemosError, match="no repository me/secret.*token"):
        Sidecars.from_pretrained("me/secret", endpoint=hub.url, token=False)


def test_without_a_network_the_cache_is_named():
    with pytest.raises(RemosError, match="did not give the record of me/far.*Without a network"):
        Sidecars.from_pretrained("me/far")


def test_a_repository_that_moved_is_followed(hub, sidecars, tmp_path):
    hold(hub, sidecars, tmp_path)
    hub.moved["me/old"] = "me/student"
    assert Sidecars.from_pretrained("me/old", endpoint=hub.url).profile == sidecars.profile
