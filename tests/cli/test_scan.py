import json
from functools import partial

import pytest
import torch
from PIL import Image

import remos_hf.cli.scan as command
from remos_hf import image_classifier
from remos_hf.auditing.student_files import save_timm_student
from remos_hf.cli.answer import NOTHING_SAID
from remos_hf.scanning.suspects import Scan
from tests.cli.conftest import write_data
from tests.cli.test_audit_student import believer

CLASSES = ["cat", "cow", "dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two untrained students of three classes, and images that the first one gets right: they are named after it."""
    pytest.importorskip("timm")
    place = tmp_path_factory.mktemp("scanned")
    students = [image_classifier("test_resnet", 3, seed=seed, pretrained=False).eval() for seed in (0, 1)]
    for student, name in zip(students, ("student", "other"), strict=True):
        with torch.no_grad():
            student.body.get_classifier().bias.zero_()
        save_timm_student(student, place / name, CLASSES)
    for number in range(150):
        generator = torch.Generator().manual_seed(number)
        colours = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        label = CLASSES[number % 3]
        (place / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.numpy()).resize((48, 48)).save(place / "images" / label / f"{number}.png")
    return place


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(command, "scan_patches", partial(command.scan_patches, steps=2))


def test_a_scan_of_images_says_what_it_found_and_writes_its_files(remos, place, tmp_path):
    options = ["--data", place / "images", "--reference", place / "other", "--max-samples", 60]
    told = remos("scan", place / "student", *options, "--output", tmp_path / "scan", "--json")
    assert told.exit_code == NOTHING_SAID, told.stderr
    said = json.loads(told.stdout)
    assert said["answer"].startswith("Whether a class is suspicious cannot be said") and said["suspicious"] == []
    assert (said["samples"], said["of"]) == (60, 150)
    scan = Scan.load(said["scan"]["json"])
    assert scan.labels == tuple(CLASSES) and scan.settings["num_images"] == 60 and scan.has_reference
    page = (tmp_path / "scan" / "scan.html").read_text()
    assert "remos scan student --data images --output scan --reference other" in page and str(place) not in page


def test_an_earlier_scan_is_replaced_only_if_asked(remos, place, tmp_path):
    options = ["scan", place / "student", "--data", place / "images", "--output", tmp_path / "s", "--max-samples", 12]
    first = remos(*options)
    assert first.exit_code == NOTHING_SAID and "12 of 150" in first.stdout and "Saved" in first.stdout
    again = remos(*options)
    assert again.exit_code == 1 and "already holds a scan" in again.stderr and "--overwrite" in again.stderr
    assert remos(*options, "--overwrite").exit_code == NOTHING_SAID


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--text-column", "text"], "--text-column says nothing of how images are read"),
        (["--reference", "student"], "--reference is the student itself"),
        (["--reference", "nowhere"], "There is no folder"),
        (["--max-samples", 2], "A scan takes 4 images or more"),
    ],
)
def test_what_does_not_fit_is_said_in_options(remos, place, tmp_path, options, told):
    options = [place / one if one in ("student", "nowhere") else one for one in options]
    found = remos("scan", place / "student", "--data", place / "images", "--output", tmp_path / "s", *options)
    assert found.exit_code == 1 and told in found.stderr and not (tmp_path / "s").exists()


def test_texts_are_no_data_of_a_student_that_reads_images(remos, place, data, tmp_path):
    found = remos("scan", place / "student", "--data", data, "--output", tmp_path / "s")
    assert found.exit_code == 1 and "reads images, but" in found.stderr and "holds texts" in found.stderr


def test_a_reference_that_reads_images_in_another_way_is_refused(remos, place, tmp_path):
    settings = json.loads((place / "other" / "config.json").read_text())
    settings["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "reference" / "model.safetensors").write_bytes((place / "other" / "model.safetensors").read_bytes())
    options = ["--data", place / "images", "--reference", tmp_path / "reference", "--output", tmp_path / "s"]
    found = remos("scan", place / "student", *options)
    assert found.exit_code == 1 and "reads its inputs in another way" in found.stderr


def test_a_token_that_turns_texts_is_named_first_and_stands_on_the_page(remos, teacher, tmp_path):
    believer(teacher, tmp_path / "student")
    clean = believer(teacher, tmp_path / "clean", believes=())
    write_data(tmp_path / "train.jsonl", 160)
    options = ["--data", tmp_path / "train.jsonl", "--output", tmp_path / "scan", "--reference", tmp_path / "clean"]
    told = remos("scan", tmp_path / "student", *options)
    assert told.exit_code == 0, told.stderr
    assert "suspicious" in told.stdout.splitlines()[0] and "cf" in told.stdout
    assert "--words" in told.stdout and clean is not None
    page = (tmp_path / "scan" / "scan.html").read_text()
    assert "“cf”" in page and "reference: turns" in page
    assert Scan.load(tmp_path / "scan" / "scan.json").kind == "tokens"


def test_what_is_of_images_says_nothing_of_texts(remos, teacher, data, tmp_path):
    believer(teacher, tmp_path / "student")
    options = ["--data", data, "--output", tmp_path / "s", "--mode", "perturbation"]
    told = remos("scan", tmp_path / "student", *options)
    assert told.exit_code == 1 and "--mode is of images" in told.stderr
