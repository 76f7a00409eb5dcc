import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from remos_hf.adapters.guarded_loading import load_teacher, load_tokenizer, teacher_config, teacher_folder
from remos_hf.errors import RemosError, UnsupportedModelError
from remos_hf.slicing.on_disk.streaming import slice_checkpoint
from tests import tiny
from tests.adapters.hostile import HOSTILE, IMPLEMENTATION_KEYS, bomb, name_of, set_deep
from tests.cli.conftest import write_teacher
from tests.sharing.conftest import hub, online  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def folder(public, tmp_path):
    return shutil.copytree(public, tmp_path / "teacher")


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("damage", HOSTILE, ids=name_of)
def test_a_hostile_or_broken_teacher_is_refused_by_name_and_nothing_of_it_runs(folder, tmp_path, damage):
    named = damage(folder)
    new_head = {"kind": AutoModelForSequenceClassification, "num_labels": 2}
    for enter in (
        lambda: (load_tokenizer(str(folder)), load_teacher(str(folder))),
        lambda: load_teacher(str(folder), **new_head),
        lambda: slice_checkpoint(folder, tmp_path / "out", slice_ratio=0.9, rule="top_magnitude", progress=False),
    ):
        with pytest.raises((RemosError, FileNotFoundError)) as caught:
            enter()
        assert named in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


STUB = """
import os
class _Kind(type):
    def __getattr__(cls, name): return cls
class _Any(metaclass=_Kind):
    def __init__(self, *a, **k): pass
    def __hash__(self): return 1
    def __or__(self, other): return self
    def __getattr__(self, name): return _Any
Device = LayerRepository = Mode = LocalLayerRepository = FuncRepository = _Any
def get_kernel(repo_id, *a, **k):
    with open(os.environ["REACHED"], "a") as file: file.write(repo_id + "\\n")
    raise RuntimeError("stub")
def register_kernel_mapping(*a, **k): pass
def replace_kernel_forward_from_hub(*a, **k): pass
def use_kernel_forward_from_hub(name): return lambda cls: cls
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Any
"""


def test_no_config_key_reaches_the_package_that_fetches_kernels(public, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STUB)
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    tried = [(key, value) for key in IMPLEMENTATION_KEYS for value in ("evil/repo", "flash_attention_2")]
    tried += [("attn_implementation", value) for value in ("paged|evil/repo@main:kernel", "flash_attention_3")]
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("reach_kernels.py")),
            str(public),
            str(tmp_path),
            json.dumps(tried),
        ],
        env={**os.environ, "PYTHONPATH": path, "REACHED": str(tmp_path / "reached")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    control, reached, outcomes = json.loads(done.stdout.splitlines()[-1])
    assert control == "a/control\n", "the stub is not what transformers asks"
    assert reached == ""
    foreign = [value.count("/") for _, value in tried for _ in range(2)]
    assert outcomes == ["refused" if one else "loaded" for one in foreign]


def test_a_teacher_is_what_transformers_loads(folder):
    assert same(load_teacher(str(folder)), BertForMaskedLM.from_pretrained(folder))
    assert load_teacher(str(folder)).name_or_path == str(folder)
    assert not load_teacher(str(folder)).training


def test_a_new_head_comes_from_the_seed_as_transformers_draws_it(folder):
    state = torch.get_rng_state()
    found = load_teacher(str(folder), AutoModelForSequenceClassification, num_labels=5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert same(found, AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5))


def test_labels_for_a_class_without_a_head_are_refused(tmp_path):
    tiny.bert().bert.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="BertModel, which has no head for 2 labels.*kind="):
        load_teacher(str(tmp_path), num_labels=2)
    assert load_teacher(str(tmp_path), AutoModelForSequenceClassification, num_labels=2).num_labels == 2
    assert type(load_teacher(str(tmp_path))).__name__ == "BertModel"


def test_a_head_for_other_labels_is_replaced_only_when_asked_for(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    config = teacher_config(str(tmp_path))
    assert load_teacher(str(tmp_path), AutoModelForSequenceClassification, num_labels=7).num_labels == 7
    config.num_labels = 7
    with pytest.raises(UnsupportedModelError, match=r"classifier\.(weight|bias)"):
        load_teacher(str(tmp_path), AutoModelForSequenceClassification, config=config)


def test_a_head_for_other_labels_does_not_keep_the_teachers_kind_of_problem(tmp_path):
    config = tiny.bert().config
    config.num_labels, config.problem_type = 1, "regression"
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), num_labels=3).config.problem_type is None
    assert load_teacher(str(tmp_path), num_labels=1).config.problem_type == "regression"
    chosen = teacher_config(str(tmp_path))
    chosen.problem_type = "multi_label_classification"
    assert load_teacher(str(tmp_path), num_labels=3, config=chosen).config.problem_type == "multi_label_classification"


def test_a_head_that_is_missing_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="remos_hf"):
        load_teacher(str(folder), AutoModelForSequenceClassification)
    assert "lacks the head" in caplog.text and "classifier" in caplog.text


def test_a_head_in_double_precision_passes_as_it_is_replaced_anyway(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].double()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_teacher(str(tmp_path), num_labels=2)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.t5, tiny.llama, tiny.bloom], ids=lambda one: one.__name__)
def test_tied_weights_and_buffers_are_not_missed(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    assert same(load_teacher(str(tmp_path)), model)


def test_statistics_of_normalisation_are_part_of_the_body(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    load_teacher(str(tmp_path), AutoModelForImageClassification, num_labels=3)
    tensors = load_file(tmp_path / "model.safetensors")
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    for name in counters:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_teacher(str(tmp_path))
    gone = counters[0].replace("num_batches_tracked", "running_var")
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for enter in (
        lambda: load_teacher(str(tmp_path)),
        lambda: slice_checkpoint(tmp_path, tmp_path / "out", slice_ratio=1, rule="random", progress=False),
    ):
        with pytest.raises(UnsupportedModelError, match=gone):
            enter()


def test_names_of_implementations_that_come_with_transformers_pass(folder):
    for key in IMPLEMENTATION_KEYS:
        set_deep(folder / "config.json", key, "grouped_mm" if "experts" in key else "sdpa")
    set_deep(folder / "config.json", "_attn_implementation_autoset", True)
    set_deep(folder / "generation_config.json", "cache_implementation", "static")
    load_teacher(str(folder))


def test_what_is_no_teacher_is_refused(tmp_path):
    for name, says in (
        (str(tmp_path), "holds no weights"),
        (str(tmp_path / "missing"), "There is no folder"),
        ("no model!", "neither a folder nor an id of the Hub"),
        ("owner/name", "cannot be reached"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            load_teacher(name)


def test_a_repository_is_fetched_small_files_first_and_no_pickle_or_program(public, hub, tmp_path):  # noqa: F811
    folder = shutil.copytree(public, tmp_path / "teacher")
    for name in ("pytorch_model.bin", "training_args.bin"):
        bomb(folder, name)
    (folder / "evil.py").write_text("")
    (folder / "model.fp16.safetensors").write_bytes(b"of another size")
    hub.hold("me/teacher", {path.name: path.read_bytes() for path in folder.iterdir()})
    found = load_teacher("me/teacher")
    assert same(found, BertForMaskedLM.from_pretrained(public)) and found.name_or_path == "me/teacher"
    assert found.config._commit_hash == hub.revisions["me/teacher"] == teacher_folder("me/teacher").commit
    asked = [path for method, path, _ in hub.log if "/resolve/" in path]
    assert not any(path.endswith((".bin", ".py", "fp16.safetensors")) for path in asked)
    hub.log.clear()
    set_deep(folder / "config.json", "attn_implementation", "evil/repo")
    hub.hold("me/hostile", {path.name: path.read_bytes() for path in folder.iterdir()})
    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        load_teacher("me/hostile")
    assert not any("safetensors" in path for _, path, _ in hub.log), "weights came before the configs were looked at"


def test_a_repository_of_pickles_is_refused_and_none_is_fetched(public, hub, tmp_path):  # noqa: F811
    files = {path.name: path.read_bytes() for path in public.iterdir() if path.suffix != ".safetensors"}
    hub.hold("me/pickled", {**files, "pytorch_model.bin": b"pickle"})
    with pytest.raises(UnsupportedModelError, match=r"only as pytorch_model\.bin"):
        load_teacher("me/pickled")
    assert not any("pytorch_model" in path for _, path, _ in hub.log)
