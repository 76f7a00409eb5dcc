import json
import shutil

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from remos_hf.cli.teacher import Teacher, check_revision, identity
from remos_hf.errors import UnsupportedModelError
from tests import tiny

TEXTS = Dataset.from_dict({"text": ["good"], "label": [1]})


def test_a_head_that_is_lacking_comes_from_the_seed_and_the_body_from_the_files(teacher):
    named = Teacher.named(str(teacher), TEXTS)
    state = torch.get_rng_state()
    one, same, other = named.load(3, 1), named.load(3, 1), named.load(3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.classifier.weight.shape[0] == 3 and torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    body = named.load_as_saved().bert.state_dict()
    assert type(named.load_as_saved()).__name__ == "BertForMaskedLM"
    assert all(torch.equal(value, one.bert.state_dict()[name]) for name, value in body.items())


def test_programs_that_come_with_a_teacher_are_not_run(teacher, tmp_path):
    place = shutil.copytree(teacher, tmp_path / "hostile")
    config = json.loads((place / "config.json").read_text())
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config["architectures"] = ["Evil"]
    (place / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    named = Teacher.named(str(place), TEXTS)
    with pytest.raises(UnsupportedModelError, match="Evil.* transformers .* does not have"):
        named.load_as_saved()
    named.load(2)
    config["model_type"] = "unheard_of"
    (place / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        named.load(2)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_padding_pads_with_its_end(teacher, tmp_path):
    place = shutil.copytree(teacher, tmp_path / "t")
    settings = {"tokenizer_class": "BertTokenizer", "pad_token": None, "eos_token": "[SEP]"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    named = Teacher.named(str(place), TEXTS)
    assert named.tokenizer.pad_token is not None and not named.reads_images


def test_texts_are_refused_by_a_teacher_that_reads_images():
    with pytest.raises(UnsupportedModelError, match="reads images, but the samples are texts"):
        Teacher.named("timm/resnet18", TEXTS)


def test_a_teacher_of_texts_and_one_of_images_say_so_before_anything_is_built(teacher, tmp_path):
    images = Dataset.from_dict(
        {"image": [None], "label": [1]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    with pytest.raises(UnsupportedModelError, match="teacher reads texts, but the samples are images"):
        Teacher.named(str(teacher), images)
    tiny.vit().save_pretrained(tmp_path / "sees")
    assert Teacher.named(str(tmp_path / "sees"), images).reads_images
    with pytest.raises(UnsupportedModelError, match="sees reads images, but the samples are texts"):
        Teacher.named(str(tmp_path / "sees"), TEXTS)


def test_pairs_of_texts_are_read_as_pairs(teacher):
    pairs = Dataset.from_dict({"text": ["good"], "text_pair": ["bad"], "label": [1]})
    task = Teacher.named(str(teacher), pairs).task(None, pairs, batch_size=2, max_length=8)
    assert task.text_columns == ("text", "text_pair")


def test_a_folder_is_named_without_its_path(teacher):
    assert identity(str(teacher), None) == {"id": "teacher", "revision": None}
    assert identity("owner/name", "main") == {"id": "owner/name", "revision": "main"}


@pytest.mark.parametrize("name", ["folder", "timm/resnet18"])
def test_a_revision_of_what_has_none_is_refused(tmp_path, name):
    name = str(tmp_path) if name == "folder" else name
    with pytest.raises(ValueError, match="--revision v1 is of a teacher on the Hub, but .* Leave it out"):
        check_revision(name, "v1")
    check_revision("owner/name", "v1")
    check_revision(name, None)
