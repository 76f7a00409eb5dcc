import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import Trainer

from remos_hf.errors import RemosError
from remos_hf.sharing.record import Sidecars
from remos_hf.training.attach import attach_remos
from tests.training.push_and_pull import SAID
from tests.training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")
SIDECARS = {"remos_config.json", "remos_coverage.safetensors", "remos_slice.safetensors"}
UNSAVED = {"save_strategy": "no", "max_steps": 1}


def trained(folder, kind, **options):
    """A RemosTrainer, or any other with attach_remos, that has trained."""
    one = trainer(folder, kind=kind, options={**UNSAVED, **options}) if kind is Trainer else None
    if one is None:
        one = trainer(folder, slice_ratio=0.9, options={**UNSAVED, **options})
    else:
        attach_remos(one, slice_ratio=0.9)
    one.train()
    return one


both = pytest.mark.parametrize("kind", [None, Trainer], ids=["RemosTrainer", "attach_remos"])


@both
def test_the_record_lies_beside_every_saved_student(tmp_path, kind):
    one = trained(tmp_path / "out", kind, save_strategy="steps", save_steps=1)
    one.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "elsewhere", tmp_path / "out" / "checkpoint-1"):
        assert Sidecars.load(folder).relevant_slice == one.relevant_slice


@both
def test_the_card_is_ours_with_what_the_example_scripts_say(tmp_path, kind):
    one = trained(tmp_path / "out", kind)
    one.create_model_card(**SAID)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert one.relevant_slice.teacher_hash in card.text and "GLUE SST2" in card.text
    data = card.data.to_dict()
    assert (data["language"], data["datasets"], data["base_model"]) == ("en", ["glue"], "owner/teacher")


def test_before_the_student_was_started_the_card_is_trainers(tmp_path):
    trainer(tmp_path, slice_ratio=0.9).create_model_card(language="en")
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()


@both
def test_a_dry_push_lists_the_files_and_needs_no_name(tmp_path, kind):
    one = trained(tmp_path / "student", kind)
    pushed = one.push_to_hub(dry_run=True, **SAID)
    assert SIDECARS | {"README.md", "model.safetensors"} <= set(pushed.files)
    assert pushed.url is None
    with pytest.raises(ValueError, match="blocking"):
        one.push_to_hub(blocking=False)


def test_a_push_before_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no student to push yet"):
        trainer(tmp_path, slice_ratio=0.9).push_to_hub()


def test_a_push_without_a_token_says_that_the_student_is_kept(tmp_path):
    one = trained(tmp_path / "student", None)
    with pytest.raises(RemosError, match="student is kept in"):
        one.push_to_hub()
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_student_pushed_while_and_after_it_trains_is_private_and_pulled_back_whole(tmp_path):
    from tests.loopback_hub import Hub

    hub = Hub().start()
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_fake", "HF_HOME": str(tmp_path / "home")}
    script = Path(__file__).with_name("push_and_pull.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told == {"same_weights": True, "same_slice": True, "sent_once": True, "url": f"{hub.url}/me/student"}
    assert hub.private["me/student"] and hub.commits >= 2
    assert "If it is new it is private" in run.stderr
    held = set(hub.repos["me/student"])
    assert SIDECARS | {"README.md", "config.json", "model.safetensors"} <= held
    assert not [name for name in held if name.endswith((".bin", ".pt", ".pth")) or "/" in name]


@pytest.mark.parametrize("way", ["checkpoint", "all_checkpoints"])
def test_pushing_whole_checkpoints_is_refused(tmp_path, monkeypatch, way):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: pytest.fail("a repository was made"))
    with pytest.raises(ValueError, match=f"hub_strategy='{way}'"):
        trainer(tmp_path, slice_ratio=0.9, options={"push_to_hub": True, "hub_strategy": way})


@both
def test_hyperparameter_search_is_refused_before_a_backend_is_asked_for(tmp_path, kind):
    with pytest.raises(ValueError, match="slice_ratio='auto'"):
        trained(tmp_path, kind).hyperparameter_search()


def test_merged_adapters_are_told_in_the_log_the_record_and_the_card(tmp_path, caplog):
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    one = trainer(tmp_path, slice_ratio=0.9, options=UNSAVED, peft_config=lora)
    one.train()
    one.save_model()
    assert "adapters merged into the sliced base" in caplog.text
    assert not list(tmp_path.glob("adapter_*"))
    assert Sidecars.load(tmp_path).config["adapters"] == {"kind": "LORA", "saved": "merged into the sliced base"}
    one.create_model_card()
    assert "| adapters | LORA, merged into the sliced base |" in (tmp_path / "README.md").read_text()


@both
def test_the_record_says_how_the_student_was_trained_and_evaluated(tmp_path, kind):
    one = trained(tmp_path / "out", kind, learning_rate=1e-4, max_steps=2)
    one.evaluate()
    one.save_model()
    config = Sidecars.load(tmp_path / "out").config
    asked = {"learning_rate": 1e-4, "seed": one.args.seed, "steps": 2, "planned_steps": 2, "precision": "fp32"}
    assert asked.items() <= config["training"].items()
    assert set(config["evaluation"]) >= {"loss"}
