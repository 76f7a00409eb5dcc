import importlib.util
import logging
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers.utils import logging as hf_logging

from remos_hf import DefectReport, ImageClassifier

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit_image_defects.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("audit_image_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def smoke(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    run(example, folder)
    return folder


def run(example, folder, *options):
    level = logging.getLogger().level
    try:
        example.main(example.parse_args(["--smoke", "--output_dir", str(folder), *options]))
    finally:
        logging.getLogger().setLevel(level)
        hf_logging.set_verbosity_error()


def arguments(example, *options):
    given = ["--cifar_resnet", "net.th", "--train_folder", "train", "--test_folder", "test", "--output_dir", "out"]
    return example.parse_args([*given, *options])


def write(folder, classes=("cat", "dog"), count=6):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(folder / name / f"{number}.png")


def test_smoke_learns_the_task_and_inherits_the_backdoor(smoke):
    report = DefectReport.load(smoke / "report.json")
    found = {(record["defect"], record["student"]): record for record in report.records}
    plain = found["patch", "finetune"]
    assert plain["acc"]["value"] > 0.9 and plain["dir"]["value"] > plain["floor"]["value"] + 0.3
    assert found["patch", "remos 0.9"]["made"]["share_kept"] == pytest.approx(0.9, abs=0.01)
    assert found["patch", "finetune"]["reactivation"].keys() == {"0", "5"}
    assert found["penultimate", "finetune"]["dir"]["num_samples"] > 0


def test_the_markdown_is_rendered_from_the_json(example, smoke):
    text = (smoke / "report.md").read_text()
    assert text == DefectReport.load(smoke / "report.json").to_markdown(budgets=(0.02, 0.05, 0.1))
    assert "## images: patch" in text and "## images: penultimate" in text


def test_a_second_run_makes_nothing(example, smoke, monkeypatch):
    before = (smoke / "report.json").read_bytes()
    monkeypatch.setattr("remos_hf.auditing.recipes.RemosTrainer", pytest.fail)
    run(example, smoke)
    assert (smoke / "report.json").read_bytes() == before


def test_plan_says_what_would_be_done_and_stops(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "run_audit", pytest.fail)
    run(example, tmp_path, "--plan")
    assert "Students to fine-tune, or to measure on what was added: 5" in capsys.readouterr().out


def test_a_public_checkpoint_gives_its_own_depth_and_logits(example, tmp_path):
    torch.manual_seed(0)
    model = example.CifarResNet(2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.0}, tmp_path / "net.th")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(example.cifar_resnet(tmp_path / "net.th").eval()(images), model.eval()(images))
    # The published ResNet-20 has three blocks a stage and 0.27M weights.
    assert sum(weight.numel() for weight in example.CifarResNet(3).parameters()) == 269722


def test_other_classes_than_the_public_ones_get_a_head_from_the_seed(example, tmp_path):
    torch.save({"state_dict": example.CifarResNet(1).state_dict()}, tmp_path / "net.th")
    args = arguments(example, "--cifar_resnet", str(tmp_path / "net.th"))
    own, fresh = example.public_model(args, 10, 0), example.public_model(args, 3, 0)
    assert isinstance(own, ImageClassifier) and fresh.body.linear.out_features == 3
    assert torch.equal(own.body.conv1.weight, fresh.body.conv1.weight)
    assert torch.equal(fresh.body.linear.weight, example.public_model(args, 3, 0).body.linear.weight)
    assert not torch.equal(fresh.body.linear.weight, example.public_model(args, 3, 1).body.linear.weight)


def test_parts_of_the_training_folder_do_not_overlap(example, tmp_path):
    write(tmp_path / "train", count=9)
    write(tmp_path / "test", count=3)
    folders = ("--train_folder", str(tmp_path / "train"), "--test_folder", str(tmp_path / "test"))
    data = example.load_data(arguments(example, *folders, "--num_attacker", "6", "--num_dev", "4", "--num_test", "5"))
    names = {part: [row["path"] for row in data[part]["image"]] for part in data}
    assert {part: len(one) for part, one in names.items()} == {"attacker": 6, "dev": 4, "student": 8, "test": 5}
    assert len({*names["attacker"], *names["dev"], *names["student"]}) == 18
    assert data["test"].features["label"].names == ["cat", "dog"]


def test_too_few_images_and_other_classes_are_refused(example, tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "test", classes=("cat", "owl"))
    folders = ("--train_folder", str(tmp_path / "train"), "--test_folder")
    with pytest.raises(SystemExit, match="missing should hold a folder of images for each class"):
        example.load_data(arguments(example, *folders, str(tmp_path / "missing")))
    with pytest.raises(SystemExit, match="--test_folder has the class 'owl', which --train_folder has not"):
        example.load_data(arguments(example, *folders, str(tmp_path / "test")))
    with pytest.raises(SystemExit, match="--num_dev: 200 samples are wanted after 8 .* there are 12"):
        example.load_data(arguments(example, *folders, str(tmp_path / "train"), "--num_attacker", "8"))


def test_unknown_defects_and_students_are_refused(example):
    with pytest.raises(SystemExit, match="--defects takes patch, .*, but got 'pach'"):
        example.defects_of(arguments(example, "--defects", "pach"))
    with pytest.raises(SystemExit, match="--students takes 'finetune'.* but got 'remos 0.8'"):
        example.students_of(arguments(example, "--students", "remos 0.8"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--high_lr_factor", "2"], "at least 3 times, but got 2"),
        (["--teacher", "resnet"], "one of --teacher and --cifar_resnet"),
        (["--augment", "mixup"], "invalid choice: 'mixup'"),
    ],
)
def test_wrong_arguments_are_refused(example, capsys, options, told):
    with pytest.raises(SystemExit):
        arguments(example, *options)
    assert told in capsys.readouterr().err
