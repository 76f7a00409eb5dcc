import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from remos_hf.adapters import timm_loading
from remos_hf.adapters.guarded_loading import load_teacher
from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.errors import CorruptFileError, NonFiniteError, RemosError, UnsupportedModelError
from tests.adapters.test_timm_models import needs_timm, pixels, same, state, without_head


@pytest.fixture
def no_pickles(monkeypatch):
    """Fail where anything is unpickled."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def teacher_file(tmp_path):
    import timm

    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@needs_timm
def test_a_timm_id_without_weights_is_drawn_from_the_seed():
    before = torch.random.get_rng_state()
    one, again, other = (image_classifier("test_resnet", 3, seed=seed, pretrained=False) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(state(one), state(again)) and not same(state(one), state(other))
    assert one.body.fc.out_features == 3


@needs_timm
def test_a_local_safetensors_file_gives_the_teacher_with_its_own_number_of_labels(teacher_file, no_pickles):
    teacher, path = teacher_file
    images = pixels()
    for file in (path, str(path)):
        assert torch.equal(image_classifier("test_resnet", checkpoint_path=file).eval()(images).logits, teacher(images))
    student = image_classifier("test_resnet", 6, checkpoint_path=path)
    assert student.body.num_classes == 6
    assert same(without_head(student.body), without_head(teacher))
    assert same(state(student), state(image_classifier("test_resnet", 6, checkpoint_path=path)))
    assert not same(state(student), state(image_classifier("test_resnet", 6, checkpoint_path=path, seed=1)))
    kept = image_classifier("test_resnet", 4, checkpoint_path=path)
    assert torch.equal(kept.body.fc.weight, teacher.fc.weight)


@needs_timm
def test_a_model_whose_own_names_start_with_body_is_loaded_bare_and_from_a_classifier(tmp_path):
    from timm.models.tresnet import TResNet

    def small(labels):
        return TResNet((1, 1, 1, 1), num_classes=labels, width_factor=0.07)

    teacher = small(3)
    for name, model in (("bare", teacher), ("classifier", ImageClassifier(teacher))):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        loaded = timm_loading._with_weights_of(small(5), tmp_path / f"{name}.safetensors")
        assert same(state(loaded), state(teacher))


@needs_timm
def test_a_file_of_another_architecture_is_refused(teacher_file):
    with pytest.raises(UnsupportedModelError, match="Missing key"):
        image_classifier("test_vit", checkpoint_path=teacher_file[1])


class Bomb:
    def __reduce__(self):
        return Path.touch, (self.target,)


@needs_timm
def test_pickles_are_refused_unopened_wherever_they_lie(tmp_path, monkeypatch):
    import timm

    bomb = Bomb()
    bomb.target = tmp_path / "exploded"
    folder = tmp_path / "folder"
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(folder), safe_serialization=True)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "weights.pth", "x.npz", "model.SAFETENSORS"):
        torch.save({"weight": bomb}, folder / name)
        with pytest.raises(UnsupportedModelError, match="can run code"):
            image_classifier("test_resnet", checkpoint_path=folder / name)
    with pytest.raises(UnsupportedModelError, match="holds none of model.safetensors"):
        image_classifier(f"local-dir:{folder}")
    torch.save({"weight": bomb}, folder / "model.safetensors")  # under a false name
    for options in (
        {"model": f"local-dir:{folder}"},
        {"model": "test_resnet", "checkpoint_path": folder / "model.safetensors"},
    ):
        with pytest.raises(CorruptFileError, match="cannot be read as safetensors"):
            image_classifier(**options)
    monkeypatch.setattr(timm_loading, "hf_hub_download", lambda *_, **__: str(folder / "pytorch_model.bin"))
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model.bin is not a .safetensors file"):
        image_classifier("test_resnet")
    assert not bomb.target.exists()
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        image_classifier("test_resnet", checkpoint_path=folder / "none.safetensors")


@needs_timm
def test_weights_come_from_the_safetensors_file_of_the_ids_repository(teacher_file, no_pickles, monkeypatch):
    import timm

    torch.manual_seed(3)
    teacher = timm.create_model("test_resnet").eval()
    save_file(teacher.state_dict(), teacher_file[1])
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(teacher_file[1])

    monkeypatch.setattr(timm_loading, "hf_hub_download", download)
    loaded = image_classifier("test_resnet.r160_in1k").eval()
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors", None)]
    assert torch.equal(loaded(pixels()).logits, teacher(pixels()))
    assert str(teacher_file[1]) not in str(loaded.body.pretrained_cfg)
    assert loaded.body.pretrained_cfg["hf_hub_id"] == "timm/test_resnet.r160_in1k"
    student = image_classifier("test_resnet", 7, seed=2)
    assert student.body.fc.out_features == 7
    assert same(without_head(student.body), without_head(teacher))


@needs_timm
def test_a_saved_folder_of_timm_is_loaded_with_its_own_configuration(tmp_path, no_pickles):
    import timm

    torch.manual_seed(5)
    teacher = timm.create_model("test_resnet", num_classes=4).eval()
    timm.models.save_for_hf(teacher, str(tmp_path), safe_serialization=True)
    loaded = image_classifier(f"local-dir:{tmp_path}").eval()
    assert torch.equal(loaded(pixels()).logits, teacher(pixels()))
    assert image_classifier(f"local-dir:{tmp_path}", 9).body.num_classes == 9
    (tmp_path / "a:b").symlink_to(tmp_path)
    assert same(state(image_classifier(f"local-dir:{tmp_path}/a:b")), state(loaded))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_classifier(f"local-dir:{tmp_path}/nowhere")


@needs_timm
@pytest.mark.parametrize(
    ("name", "given", "files"),
    [
        ("test_resnet", None, ["model.safetensors"]),
        ("test_resnet", "open_clip_pytorch_model.bin", ["open_clip_pytorch_model.safetensors"]),
        ("test_resnet", "other.safetensors", ["other.safetensors"]),
        ("hf-hub:someone/some@v1", None, ["model.safetensors", "open_clip_model.safetensors"]),
    ],
)
def test_a_repository_without_safetensors_is_refused_with_the_reason(monkeypatch, no_pickles, name, given, files):
    import timm

    known, asked = timm.get_pretrained_cfg("test_resnet"), []
    known.hf_hub_filename = given

    def download(repo, file, revision=None):
        asked.append((file, revision))
        raise EntryNotFoundError("404")

    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: known)
    monkeypatch.setattr(timm_loading, "hf_hub_download", download)
    with pytest.raises(UnsupportedModelError, match=r"no safetensors weights.*is a pickle"):
        image_classifier(name)
    assert asked == [(file, "v1" if name.endswith("@v1") else None) for file in files]


@needs_timm
def test_without_network_the_network_is_named_not_the_repository(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm_loading, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="weights of test_resnet .* and the Hub cannot be reached"):
        image_classifier("test_resnet")


@needs_timm
def test_ids_that_timm_knows_only_by_a_url_are_refused(no_pickles):
    with pytest.raises(UnsupportedModelError, match=r"knows it only at https://.*\.pth"):
        image_classifier("gcvit_xxtiny.in1k")


def saved_by_timm(folder):
    import timm

    torch.manual_seed(5)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=4), str(folder), safe_serialization=True)
    return folder


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


CONV = "layer1.0.conv1.weight"


def edited(change):
    return lambda folder: edit(folder, change)


def behind_another_number_of_labels(folder):
    edit(folder, lambda found: found.pop(CONV))
    change_config(folder, model_args={"num_classes": 7})


def linked(folder):
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "x.safetensors")


HOSTILE = {
    "missing": (edited(lambda found: found.pop(CONV)), UnsupportedModelError, CONV),
    "missing norm": (edited(lambda found: found.pop("bn1.weight")), UnsupportedModelError, "bn1.weight"),
    "missing behind another number of labels": (behind_another_number_of_labels, RemosError, "num_classes"),
    "misshapen": (edited(lambda found: found.update({CONV: found[CONV][1:].clone()})), RemosError, CONV),
    "int8": (edited(lambda found: found.update({CONV: found[CONV].char()})), RemosError, CONV),
    "float8": (edited(lambda found: found.update({CONV: found[CONV].to(torch.float8_e5m2)})), RemosError, CONV),
    "NaN": (edited(lambda found: found["bn1.bias"].fill_(float("nan"))), NonFiniteError, "bn1.bias"),
    "architecture elsewhere": (
        lambda folder: change_config(folder, architecture="hf-hub:evil/repo"),
        UnsupportedModelError,
        "architecture",
    ),
    "checkpoint elsewhere": (
        lambda folder: change_config(folder, model_args={"checkpoint_path": "/elsewhere/evil.pth"}),
        UnsupportedModelError,
        "checkpoint_path",
    ),
    "link": (linked, CorruptFileError, "x.safetensors"),
}


@needs_timm
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_of_timm_is_refused_by_name(tmp_path, no_pickles, case):
    damage, error, named = HOSTILE[case]
    folder = saved_by_timm(tmp_path / "timm")
    damage(folder)
    with pytest.raises(error, match=named):
        image_classifier(f"local-dir:{folder}")


@needs_timm
def test_a_name_that_timm_has_not_is_told_with_those_like_it():
    with pytest.raises(UnsupportedModelError, match="has no model 'resnet8'. Names like it: .*resnet18"):
        image_classifier("resnet8", 3)


@needs_timm
def test_a_teacher_of_timm_comes_in_evaluation_mode_as_all_do(tmp_path):
    import timm

    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "net"), safe_serialization=True)
    teacher = load_teacher(f"timm/local-dir:{tmp_path / 'net'}")
    assert not any(module.training for module in teacher.modules())
