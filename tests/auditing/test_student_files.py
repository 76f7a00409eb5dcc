import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification

from remos_hf import ImageClassifier, fit, image_classifier
from remos_hf.auditing.student_files import load_student, save_timm_student
from remos_hf.errors import CorruptFileError, UnsupportedModelError
from remos_hf.sharing.record import Sidecars
from remos_hf.strategies.base import Preparation
from remos_hf.strategies.plain import Finetune
from tests import tiny
from tests.cli.conftest import write_teacher


@pytest.fixture
def saved(tmp_path):
    """A classifier of texts with the tokenizer beside it, as save_pretrained writes both."""
    folder = write_teacher(tmp_path / "student")
    student = tiny.bert()
    student.config.id2label, student.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    student.save_pretrained(folder)
    return folder, student


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_classifier_of_texts_comes_with_its_tokenizer_and_the_names_of_its_classes(saved):
    folder, student = saved
    found = load_student(folder)
    assert same(found.model, student) and not found.model.training and not found.reads_images
    assert found.class_names == ("bad", "good") and found.record is None
    assert found.reader("good film")["input_ids"][0] == found.reader.cls_token_id


@pytest.mark.parametrize(
    ("columns", "read"),
    [(("text",), ("text",)), (("sentence",), ("sentence",)), (("premise", "hypothesis"), ("premise", "hypothesis"))],
)
def test_samples_are_read_by_the_usual_names_of_their_columns(saved, columns, read):
    samples = Dataset.from_dict({**{name: ["good film"] for name in columns}, "label": [1]})
    assert load_student(saved[0]).task(samples).text_columns == read


def test_labels_that_transformers_numbered_are_no_names(saved):
    folder, student = saved
    student.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    student.save_pretrained(folder)
    assert load_student(folder).class_names is None


def test_a_type_of_weights_stays_as_it_was_saved(saved):
    folder, student = saved
    student.to(torch.bfloat16).save_pretrained(folder)
    assert load_student(folder).model.dtype == torch.bfloat16


def test_what_reads_the_inputs_may_be_the_teachers_and_is_asked_for_otherwise(saved, tmp_path):
    folder, _ = saved
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.*name the teacher"):
        load_student(folder)
    assert load_student(folder, reader=str(teacher)).reader.vocab_size == 29


def test_an_image_classifier_comes_with_how_it_reads_images(tmp_path):
    student = tiny.vit()
    student.save_pretrained(tmp_path)
    values = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_normalize": False}
    with pytest.raises(FileNotFoundError, match="holds no image processor"):
        load_student(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    found = load_student(tmp_path)
    assert found.reads_images and found.reader.size == (8, 8) and same(found.model, student)


def test_what_was_fitted_is_loaded_by_its_record(tmp_path):
    student = tiny.bert()
    rows = [{"input_ids": torch.tensor([1, 2, 3 + number % 5]), "labels": number % 2} for number in range(8)]
    options = {"strategy": Finetune(), "epochs": 1, "batch_size": 4, "output_dir": tmp_path, "progress": False}
    fit(student, rows, optimizer=lambda one: torch.optim.SGD(one.parameters(), lr=0.1), **options)
    teacher = write_teacher(tmp_path / "teacher")
    found = load_student(tmp_path, reader=str(teacher))
    assert same(found.model, student) and found.record.config["strategy"]["name"] == "Finetune"


def test_a_sliced_teacher_is_no_student_yet(tmp_path):
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM, which is no classifier.*trained first"):
        load_student(write_teacher(tmp_path / "sliced"))


def test_weights_that_nothing_describes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_student(tmp_path / "none")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="nothing says what model the weights belong to"):
        load_student(tmp_path)


def test_a_student_is_looked_at_like_a_teacher(saved, tmp_path):
    folder, _ = saved
    outside = shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CorruptFileError):
        load_student(folder)


@pytest.fixture(scope="module")
def of_timm():
    pytest.importorskip("timm")
    return image_classifier("test_resnet", 3, seed=1, pretrained=False).eval()


def recorded(student, folder, teacher):
    Sidecars.of(Finetune(), Preparation(), student, teacher={"id": teacher, "revision": None}).save(folder)


@pytest.mark.timm
def test_a_student_of_timm_is_saved_so_that_everything_loads_it_again(of_timm, tmp_path):
    import timm

    save_timm_student(of_timm, tmp_path, ["a", "b", "c"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = of_timm(pixels).logits
    found = load_student(tmp_path)
    assert found.class_names == ("a", "b", "c") and found.reads_images and same(found.model, of_timm)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(pixels), logits)
    weights = tmp_path / "model.safetensors"
    assert same(image_classifier("test_resnet", checkpoint_path=weights), of_timm)
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(wrapper(pixels).logits, logits, atol=1e-6)
    assert wrapper.config.id2label == {0: "a", 1: "b", 2: "c"}
    wrapper.save_pretrained(tmp_path / "wrapped")
    again = load_student(tmp_path / "wrapped")
    assert torch.allclose(again.model(pixels).logits, logits, atol=1e-6)
    assert again.class_names == found.class_names and again.reader == found.reader


@pytest.mark.timm
def test_a_student_of_timm_that_a_trainer_saved_is_loaded_by_its_record_alone(of_timm, tmp_path, caplog):
    from safetensors.torch import save_model

    save_model(of_timm, str(tmp_path / "model.safetensors"))
    recorded(of_timm, tmp_path, "timm/test_resnet.r160_in1k")
    assert same(load_student(tmp_path).model, of_timm) and not caplog.records
    recorded(of_timm, tmp_path, "my-teacher")
    with caplog.at_level(logging.WARNING):
        assert load_student(tmp_path).class_names is None
    assert "does not say which weights" in caplog.text


@pytest.mark.timm
def test_what_an_example_wrote_beside_a_student_of_timm_is_read(of_timm, tmp_path):
    from safetensors.torch import save_model

    save_model(of_timm, str(tmp_path / "model.safetensors"))
    images = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    described = {"model": "test_resnet", "labels": ["a", "b", "c"], "images": images}
    (tmp_path / "image_classifier.json").write_text(json.dumps(described))
    found = load_student(tmp_path)
    assert found.class_names == ("a", "b", "c") and found.reader.size == (32, 32)
    described["model"] = "hf-hub:somebody/else"
    (tmp_path / "image_classifier.json").write_text(json.dumps(described))
    with pytest.raises(UnsupportedModelError, match="names no model that timm itself has"):
        load_student(tmp_path)


@pytest.mark.timm
def test_a_student_whose_name_would_not_make_it_again_is_refused(tmp_path):
    import timm

    body = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    with pytest.raises(UnsupportedModelError, match="made with arguments of its own"):
        save_timm_student(ImageClassifier(body), tmp_path / "student")
    assert not (tmp_path / "student").exists()
