import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "detect_with_slices.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("detect_with_slices", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    datasets.enable_progress_bars()


def test_smoke_finds_and_draws(example, tmp_path):
    told = example.main(example.parse_args(["--smoke", "--output_dir", str(tmp_path)]))
    assert json.loads((tmp_path / "detection.json").read_text())["counts"] == told["counts"]
    assert told["counts"]["attacked"] > 5 and told["counts"]["clean"] > 20
    assert list(told["found"]) == ["no attack shown", "fgsm_8 shown"]
    shown = told["found"]["fgsm_8 shown"]["slices (global reference)"]
    assert shown["recall"]["num_samples"] == told["counts"]["attacked"] and shown["auroc"] > 0.5
    assert "caught" in example.table(told)
    with Image.open(tmp_path / "roc.png") as drawn:
        assert drawn.width == 1280


def test_it_says_what_it_needs(example, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.parse_args(["--teacher", "net", "--output_dir", str(tmp_path)])
    assert "--train_folder" in capsys.readouterr().err
