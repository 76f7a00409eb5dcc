import json

import pytest
import torch

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.errors import CorruptFileError, RemosError
from remos_hf.sharing.record import CONFIG_FILE, Sidecars
from remos_hf.strategies.plain import Finetune
from remos_hf.strategies.slice_and_reset import Random, Remos
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


def made_by(strategy):
    student = tiny.bert()
    return Sidecars.of(strategy, strategy.prepare(student, lambda samples: tiny.text_batches()), student)


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


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {}, "format_version": "x"}'])
def test_a_broken_config_is_refused_by_name(sidecars, tmp_path, content):
    sidecars.save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(CorruptFileError, match="remos_config.json"):
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
    with pytest.raises(RemosError, match="'slice_ratio': 0.9.*'slice_ratio': 0.8"):
        loaded.check_strategy(Remos(0.8))
