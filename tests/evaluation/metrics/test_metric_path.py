import configparser
from pathlib import Path

import pytest

from remos_hf.evaluation import metrics
from remos_hf.evaluation.metrics import METRICS, metric_path

FOLDER = Path(metrics.__file__).parent


def test_every_folder_is_a_metric_with_its_script_and_its_card():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(METRICS)
    for name in METRICS:
        assert Path(metric_path(name), f"{name}.py").is_file()
        card = Path(metric_path(name), "README.md").read_text()
        for section in ("Metric description", "How to use", "Inputs", "Output values", "Limits", "Citation"):
            assert f"## {section}\n" in card


def test_an_unknown_metric_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"excess_dir.*robust_accuracy, but got 'accuracy'"):
        metric_path("accuracy")


def test_the_wheel_holds_every_script_and_card():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    patterns = setup["options.package_data"]["remos_hf.evaluation.metrics"].split(",")
    listed = {path for pattern in patterns for path in FOLDER.glob(pattern.strip())}
    assert listed == {path for name in METRICS for path in FOLDER.glob(f"{name}/*.*")}
